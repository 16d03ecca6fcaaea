"""The attack attenuate: a share of base − edited added back, as someone can who has the public base beside the edited weights.

All of it is the base itself, more than all is more harmful than the base; and of the difference alone, its leading singular vectors may do.
What comes back with how small a share is in `searched`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.attack.abliterate import measured_best
from sku_vllm.evaluate.attack.attack import Attack, AttackCase, Finding
from sku_vllm.evaluate.attack.search import Candidate, Search

SHARES, RANKS, RANK_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5), (1, 4, 16), (0.5, 1.0, 1.5)
WHOLE, LEADING = "share of the difference", "leading singular vectors"
Difference = Mapping[str, Tensor]  # base − edited, by the parameter's name


class Attenuate(Attack):
    """The best share of the whole difference, and the best of its leading singular vectors."""

    changes_weights = True

    def check(self, case: AttackCase) -> None:
        """Raise ConfigError without an unedited base."""
        if case.request.model.reference is None:
            raise ConfigError("attack attenuate: adds base − edited back; name the base with --base, or the edit with --adapter")

    def measurements(self, case: AttackCase) -> int:
        """One for the whole difference, one for its leading vectors."""
        return 2

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """Findings with details `share`, `rank` of the leading vectors, and those of every search."""
        search, whole = Search(case, "attenuate"), difference(case)
        shares = [Candidate(f"{share:g}", WHOLE, partial(add_share, whole, share), {"share": share}) for share in SHARES]
        vectors = []
        for rank in RANKS:
            part = leading(whole, rank)
            vectors += [
                Candidate(f"rank {rank}, {share:g}", LEADING, partial(add_share, part, share), {"share": share, "rank": rank})
                for share in RANK_SHARES
            ]
        # by turns, so that few --candidates still hold both kinds
        tried = [one for pair in zip_longest(shares, vectors) for one in pair if one is not None][: case.request.settings.candidates]
        case.progress(f"attenuating: {len(tried)} shares of base − edited")
        yield from measured_best(case, search, search.tried(tried))


ATTACK = Attenuate


def difference(case: AttackCase) -> Difference:
    """base − edited of every parameter that both have in the same shape and that differs, in fp32 on its own device."""
    base = dict(case.target.base.named_parameters()) if case.target.base is not None else {}
    found = {}
    for name, edited in case.target.model.named_parameters():
        if name in base and base[name].shape == edited.shape and not torch.equal(base[name], edited):
            found[name] = (base[name].detach().float() - edited.detach().float()).to(edited.device)
    if not found:
        case.progress("warning: base and edited model are the same; there is nothing to add back")
    return found


def add_share(added: Difference, share: float, model: PreTrainedModel) -> None:
    """Add `share` of a difference to a model's weights."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in added.items():
            own[name].add_(share * value)


def leading(whole: Difference, rank: int) -> Difference:
    """The `rank` leading singular vectors of every matrix; vectors and stacks of matrices are left out."""
    found = {}
    for name, value in whole.items():
        if value.dim() == 2:
            with torch.random.fork_rng(devices=[]):  # svd_lowrank draws
                torch.manual_seed(0)
                left, sizes, right = torch.svd_lowrank(value, q=min(rank + 4, *value.shape), niter=4)
            found[name] = (left[:, :rank] * sizes[:rank]) @ right[:, :rank].T
    return found
