"""What a method is made of: sides of the base, loss terms over kinds of rows, and phases of training.

Open this file to write a method; each file beside it is one, and `losses.py` has the losses that their terms weigh.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

# forget: a harmful prompt and its answer. mismatched: a harmful prompt with answers of other harmful prompts.
# benign_answers: a harmful prompt with the answer of a retain row. refusals: a harmful prompt with a refusal that the user gave.
# retain: a benign prompt and its answer. The others exist in contrastive methods only, which draw answers during training:
# samples: a harmful prompt with a refusal: from the target distribution p* (losses.contrast), from the base asked to refuse, or given.
# self_generated: a prompt that the base made up itself, with an answer of the model that `samples` were drawn from.
# safety_recovery: a harmful prompt, the beginning of a harmful answer, then the sample: refusing in the middle of an answer.
# restarts: a harmful prompt, the sample once or twice without its end token, then the sample: refusing again if stopping was prevented.
# border: a benign prompt in the style of the forget set, with the base's own answer.
RowKind = Literal[
    "forget", "mismatched", "benign_answers", "refusals", "retain", "samples", "self_generated", "safety_recovery", "restarts", "border"
]


class Side(Enum):
    """Which model computes a row: the base with the delta added, subtracted or absent. Sides are sorted in the order listed here."""

    ATTACKED = "attacked"
    """base − delta, on base weights that a simulated attacker, the adversary, has fine-tuned (train/adversary.py)."""
    SERVED = "served"
    """base − delta: the model that will be served."""
    BASE = "base"
    """The base with the adapter off."""
    ADAPTED = "adapted"
    """base + delta: the model that is more harmful than the base."""

    @property
    def sign(self) -> int:
        """What the delta is multiplied by: −1, 0 or +1."""
        return {Side.BASE: 0, Side.ADAPTED: 1}.get(self, -1)

    def __lt__(self, other: "Side") -> bool:
        members = list(Side)
        return members.index(self) < members.index(other)


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted loss over one kind of rows.

    Attributes:
        name: key of this loss in history, records and trackers.
        loss: logits [n, V], targets [n] and one logits [n, V] per reference → values [n] (see losses.py); with `depth` hidden states
            [n, d] take the place of logits.
        tokens: which of a row's tokens count: its answer, all of them, the answer's first, the answer after the first, or its last.
        mean: "tokens" averages over all tokens of all rows; "rows" over the tokens of each row, then over rows.
        references: frozen models to compare with, each giving `loss` its logits: Side.BASE, Side.ADAPTED.
        sequence: function of the sum of a row's values, for losses of whole answers (npo); the mean is over rows then.
        per_length: `sequence` gets the mean of a row's values instead of their sum (simnpo).
        depth: None, or a share of the model's layers, above 0 and below 1: the loss reads the hidden states after so many layers (rmu).
        begin: first step of the phase that has this term.
        resists: at steps at which the phase's adversary is active, the term is added once more, computed on Side.ATTACKED.
    """

    name: str
    weight: float
    rows: RowKind
    side: Side
    loss: Callable[..., "torch.Tensor"]
    tokens: Literal["answer", "all", "first", "later", "last"] = "answer"
    mean: Literal["tokens", "rows"] = "tokens"
    references: tuple[Side, ...] = ()
    sequence: Callable[["torch.Tensor"], "torch.Tensor"] | None = None
    per_length: bool = False
    depth: float | None = None
    begin: int = 0
    resists: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps with an optimizer of its own, and what becomes of the adapter afterwards.

    Attributes:
        steps: optimizer steps. terms: the losses whose weighted sum is minimised.
        fold: the next phase starts from the model minus fold·delta; fold·delta stays part of the saved adapter.
        keep: True = later phases use the adapter as the reference Side.ADAPTED, train a new one, and only that is saved.
        look_at: step of the phase at which a few samples are drawn, to see early whether they will be refusals; None does not look.
        sample_at: step of the phase at which the contrastive samples are drawn; None draws none.
        adversary: True = a simulated attacker fine-tunes the served model during the phase (train/adversary.py).
    """

    steps: int
    terms: tuple[Term, ...]
    fold: float | None = None
    keep: bool = False
    look_at: int | None = None
    sample_at: int | None = None
    adversary: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A named recipe.

    Attributes:
        name: what `--method` takes. summary: one sentence for people.
        phases: a TrainConfig → what to train. (Typed as Any, since TrainConfig looks up methods by name.)
        defaults: settings of TrainConfig by name, as published or as chosen on the fictional data of `sku lab`.
        written: those that differ for refusals that are learned as texts (`train_config.WRITTEN`), as chosen on SmolLM2-135M-Instruct.
        served_side: True where every term is on Side.SERVED: the trained model is the served one, and delta its negative.
    """

    name: str
    summary: str
    phases: Callable[[Any], list[Phase]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    served_side: bool = False


class Rounds(Protocol):
    """What `one_phase` reads of a TrainConfig."""

    @property
    def steps(self) -> int:
        """Optimizer steps a round."""
        ...

    @property
    def rounds(self) -> int:
        """How often to train and subtract."""
        ...

    @property
    def fold(self) -> float:
        """Share of a round's delta that is subtracted before the next round."""
        ...


Config = TypeVar("Config", bound=Rounds)


def one_phase(terms: Callable[[Config], list[Term]]) -> Callable[[Config], list[Phase]]:
    """Phases of a method that trains once, or `rounds` times with the delta folded in between; terms of weight 0 are left out."""

    def phases(config: Config) -> list[Phase]:
        wanted = tuple(term for term in terms(config) if term.weight)
        if config.rounds == 1:
            return [Phase(config.steps, wanted)]
        return [Phase(config.steps, wanted, fold=config.fold) for _ in range(config.rounds)]

    return phases
