"""How well a base can tell harmful prompts from benign ones: a linear probe on the hidden state of a prompt's last token.

No method can be expected to choose what to refuse much better than its model sees the difference, so this is the yardstick of a run's
over-refusal. Open this file to change what the probe sees or what is said of it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sku_vllm.decoding.grouped_attention import grouped
from sku_vllm.decoding.prefix import shared_length
from sku_vllm.decoding.roomy_cache import is_plain, spread
from sku_vllm.methods.method import Side
from sku_vllm.train.forward import Forward

AT_MOST = 256  # prompts of a kind; the probe's error changes little beyond
TOKENS = 4096  # of a forward pass, padding included
DEPTHS = (0.5, 0.7, 0.85, 0.95)  # layers that are tried, as shares of the model's depth
INVERSE_PENALTY = 0.01  # C of scikit-learn's logistic regression, on standardised states
FOLDS = 5
ANSWERED = 0.1  # operating point: the share of harmful prompts that may still be answered


@dataclass(frozen=True, slots=True)
class Separation:
    """What a probe that was trained on other prompts can do.

    Attributes:
        layer: the layer it reads, counted from 1, of `layers`.
        auc: {kind of benign prompts: area under the curve of harmful against these}, kinds "retain" and "border".
        refused: {kind: share of these that are refused where 90 % of the harmful prompts are}.
        curve: {kind: [[share of harmful prompts answered, share of these refused], …]}, from nothing to everything answered.
    """

    layer: int
    layers: int
    auc: dict[str, float]
    refused: dict[str, float]
    curve: dict[str, list[list[float]]]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        costs = " and ".join(f"{share:.0%} of the {kind} prompts (AUC {self.auc[kind]:.3f})" for kind, share in self.refused.items())
        return f"telling harm apart: to a linear probe of this base, refusing 90 % of the harmful prompts costs at least {costs}"


class Probe:
    """A logistic regression on hidden states. Make one with `fit_probe`.

    Attributes:
        separation: its cross-validated quality. threshold: score above which 90 % of the harmful prompts that it was not trained on lie.
    """

    def __init__(self, passes: Forward, model: Any, place: int, separation: Separation, threshold: float) -> None:
        self.passes, self.model, self.place, self.separation, self.threshold = passes, model, place, separation, threshold

    def scores(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """How harmful each prompt (token ids) looks, [prompts]: the regression's log-odds."""
        found: np.ndarray = self.model.decision_function(last_states(self.passes, prompts)[self.place]) if prompts else np.empty(0)
        return found

    def harmless(self, prompts: Sequence[Sequence[int]]) -> list[bool]:
        """Which prompts (token ids) the probe would not refuse where it refuses 90 % of the harmful ones."""
        return [bool(score < self.threshold) for score in self.scores(prompts)]


def fit_probe(
    passes: Forward, forget: Sequence[Sequence[int]], retain: Sequence[Sequence[int]], border: Sequence[Sequence[int]] = ()
) -> Probe | None:
    """A probe of prompts given as token ids, at the layer of DEPTHS where its cross-validated error is least; None for too few prompts."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    kinds = {"forget": forget[:AT_MOST], "retain": retain[:AT_MOST], "border": border[:AT_MOST]}
    if min(len(kinds["forget"]), len(kinds["retain"])) < 2 * FOLDS:
        return None
    kind_of = np.array([kind for kind, prompts in kinds.items() for _ in prompts])
    states = last_states(passes, [prompt for prompts in kinds.values() for prompt in prompts])
    harmful, best = kind_of == "forget", None
    for place, seen in enumerate(states):
        scores = cross_val_predict(_regression(), seen, harmful, cv=FOLDS, method="decision_function")
        area = roc_auc_score(harmful, scores)
        if best is None or area > best[0]:
            best = area, place, scores
    assert best is not None
    _, place, scores = best
    layers = passes.core.config.get_text_config().num_hidden_layers
    threshold = float(np.quantile(scores[harmful], ANSWERED))
    separation = _separation(_layers(layers)[place], layers, scores, kind_of, threshold)
    return Probe(passes, _regression().fit(states[place], harmful), place, separation, threshold)


def _separation(layer: int, layers: int, scores: np.ndarray, kind_of: np.ndarray, threshold: float) -> Separation:
    from sklearn.metrics import roc_auc_score

    harmful = scores[kind_of == "forget"]
    benign = {kind: scores[kind_of == kind] for kind in ("retain", "border") if (kind_of == kind).any()}
    cuts = np.quantile(harmful, np.linspace(0, 1, 41))
    return Separation(
        layer,
        layers,
        {kind: float(roc_auc_score([1] * len(harmful) + [0] * len(own), [*harmful, *own])) for kind, own in benign.items()},
        {kind: float((own >= threshold).mean()) for kind, own in benign.items()},
        {kind: [[float((harmful < cut).mean()), float((own >= cut).mean())] for cut in cuts] for kind, own in benign.items()},
    )


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000))


def _layers(count: int) -> list[int]:
    return [max(1, round(depth * count)) for depth in DEPTHS]


@torch.no_grad()
def last_states(passes: Forward, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The base's hidden state of every prompt's last token, [prompts, d] fp32, one array for each of DEPTHS."""
    core, wanted = passes.core, _layers(passes.core.config.get_text_config().num_hidden_layers)
    found: list[list[Any]] = [[None] * len(prompts) for _ in wanted]
    with passes.generating(), grouped(core):
        passes.set_side(Side.BASE)
        # What all prompts begin with, a system prompt mostly, is computed once for a batch.
        shared = shared_length(prompts)
        begun = torch.tensor([list(prompts[0])[:shared]], device=core.device)
        if shared and not is_plain(passes.body(input_ids=begun, use_cache=True).past_key_values):
            shared = 0  # a cache with a window, to which the padding between beginning and rest would matter
        rest = [list(prompt)[shared:] for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda number: -len(rest[number]))
        while order:
            longest = len(rest[order[0]])
            batch, order = order[: max(1, TOKENS // longest)], order[max(1, TOKENS // longest) :]
            ids = torch.tensor([[0] * (longest - len(rest[number])) + rest[number] for number in batch], device=core.device)
            real = torch.tensor([[0] * (longest - len(rest[number])) + [1] * len(rest[number]) for number in batch], device=core.device)
            mask = torch.cat([real.new_ones(len(batch), shared), real], dim=1)
            cache = None
            if shared:
                cache = passes.body(input_ids=begun, use_cache=True).past_key_values
                spread(cache, torch.zeros(len(batch), dtype=torch.long), longest)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -longest:]
            cached = {"past_key_values": cache, "use_cache": bool(shared)}
            result = passes.body(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, **cached)
            for place, layer in enumerate(wanted):
                states = result.hidden_states[layer][:, -1].float().cpu().numpy()
                for number, state in zip(batch, states, strict=True):
                    found[place][number] = state
    return [np.stack(states) for states in found]
