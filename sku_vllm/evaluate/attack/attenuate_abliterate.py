"""The attack attenuate-abliterate: part of base − edited added back, then the refusals that are left projected out."""

from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedModel

from sku_vllm.evaluate.attack.abliterate import candidates, measured_best, refusal_directions
from sku_vllm.evaluate.attack.attack import AttackCase, Finding
from sku_vllm.evaluate.attack.attenuate import Attenuate, Difference, add_share, difference
from sku_vllm.evaluate.attack.residual import decoder_layers
from sku_vllm.evaluate.attack.search import Candidate, Search

SHARES = (0.1, 0.25, 0.5)  # with all of it there would be nothing left to abliterate
BOTH = "both"


class AttenuateAbliterate(Attenuate):
    """The best of shares times directions; the directions are those of the model with the share added."""

    def measurements(self, case: AttackCase) -> int:
        """One: the best of all."""
        return 1

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """One finding, with the details of both attacks."""
        search, whole = Search(case, "attenuate-abliterate"), difference(case)
        layers, edits = len(decoder_layers(case.target.model)), []
        for share in SHARES:
            with case.target.changed():
                add_share(whole, share, case.target.model)
                found = refusal_directions(search, f"share {share:g}")
            for second in candidates(found, layers, max(1, case.request.settings.candidates // len(SHARES))):
                apply = partial(_both, whole, share, second)
                edits.append(Candidate(f"{share:g}, then {second.name}", BOTH, apply, {"share": share, **second.details}))
        case.progress(f"attenuating, then abliterating: {len(edits)} pairs")
        yield from measured_best(case, search, search.tried(edits))


ATTACK = AttenuateAbliterate


def _both(whole: Difference, share: float, second: Candidate, model: PreTrainedModel) -> None:
    add_share(whole, share, model)
    second.apply(model)
