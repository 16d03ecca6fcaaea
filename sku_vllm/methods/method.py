"""What a method is: phases of training, each a sum of terms over named rows.

Rows: `forget` (harmful prompt and answer), `mismatched` (harmful prompt, answers of other harmful prompts), `benign_answers`
(harmful prompt, answer of a retain row), `refusals` (harmful prompt, a refusal), `retain`,
`samples` (refusals drawn during training, see contrastive.py), `recoveries` (harmful prompt, a harmful answer begun, the sample),
`restarts` (harmful prompt, the sample not let end, the sample again). Side +1 is
base + delta, the adapted model; side −1 is base − delta, the model that will be served; side −2 the same on weights that someone relearns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from sku_vllm.methods.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted loss over one kind of rows.

    Attributes:
        loss: logits [n, V], targets [n] and one logits [n, V] per reference → values [n] (see losses.py).
        tokens: which of a row's tokens count: its answer, all of them, the answer's first, or the answer after the first.
        mean: over all tokens alike, or over rows first ("rows").
        references: frozen models to compare with, "base" or "adapted".
        sequence: applied to a row's sum of values, where a loss is about whole answers.
        begin: first step of the phase that has this term.
        resists: at most steps of a phase with a relearner, counted also on the weights that it has fine-tuned.
    """

    name: str
    weight: float
    rows: Literal["forget", "mismatched", "benign_answers", "refusals", "retain", "samples", "unasked", "recoveries", "restarts"]
    side: Literal[1, -1, -2]
    loss: Callable[..., "torch.Tensor"]
    tokens: Literal["answer", "all", "first", "later"] = "answer"
    mean: Literal["tokens", "rows"] = "tokens"
    references: tuple[Literal["base", "adapted"], ...] = ()
    sequence: Callable[["torch.Tensor"], "torch.Tensor"] | None = None
    begin: int = 0
    resists: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps with an optimizer of its own, and what becomes of the adapter afterwards.

    Attributes:
        fold: subtract fold·delta from the model that the next phase starts from; the delta stays part of the result.
        keep: True = the adapter stays only as the reference "adapted"; the next phase starts a new one.
        sample_at: step at which the contrastive samples are drawn.
        relearner: True = an adversary fine-tunes the served model all along (relearner.py).
    """

    steps: int
    terms: tuple[Term, ...]
    fold: float | None = None
    keep: bool = False
    sample_at: int | None = None
    relearner: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A name, a sentence, defaults that were measured on the lab, and the phases a configuration asks for."""

    name: str
    summary: str
    phases: Callable[["TrainConfig"], list[Phase]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    served_side: bool = False  # trains the served model itself (side −1 only): delta is its negative


def one_phase(terms: Callable[["TrainConfig"], list[Term]]) -> Callable[["TrainConfig"], list[Phase]]:
    """Phases of a method that trains once, or `rounds` times with the delta folded in between."""

    def phases(config: "TrainConfig") -> list[Phase]:
        wanted = tuple(term for term in terms(config) if term.weight)
        if config.rounds == 1:
            return [Phase(config.steps, wanted)]
        return [Phase(config.steps, wanted, fold=config.fold) for _ in range(config.rounds)]

    return phases
