"""What a run has to compute: its steps by kind, their forward tokens, and the answers that it draws.

`pace.py` and `dry_run.py` turn it into time. Open this file if a method draws more or fewer answers than `answers_to_draw` says.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sku_vllm.data import Encoded
from sku_vllm.methods.method import Term
from sku_vllm.methods.train_config import WRITTEN, TrainConfig
from sku_vllm.train.adversary import Adversary, with_attacked

if TYPE_CHECKING:
    from sku_vllm.train.batches import Batches
    from sku_vllm.train.run import Run

STAND_INS = 64  # forget rows that stand in for samples which are not drawn yet


@dataclass(frozen=True, slots=True)
class Kind:
    """Steps that cost the same for each forward token: those of one phase with the same terms and the adversary active or not."""

    phase: int
    terms: tuple[str, ...]
    attacked: bool


def terms_at(run: "Run", at: int) -> list[Term]:
    """The terms of step `at` of the run, as the step counts them."""
    phase, _, within = run.place(at)
    terms = [term for term in phase.terms if within >= term.begin]
    return with_attacked(terms) if phase.adversary and Adversary.at_work(within) else terms


def steps_by_kind(run: "Run") -> dict[Kind, list[int]]:
    """All steps of the run, in order, by their kind."""
    found: dict[Kind, list[int]] = {}
    for at in range(run.total):
        phase, number, within = run.place(at)
        names = tuple(term.name for term in phase.terms if within >= term.begin)
        found.setdefault(Kind(number, names, phase.adversary and Adversary.at_work(within)), []).append(at)
    return found


def sizes(run: "Run", steps: Sequence[int], most: int) -> dict[int, int]:
    """Forward tokens of the steps, or of `most` of them if there are more."""
    looked_at = sorted(random.Random(0).sample(steps, min(most, len(steps))))
    return {at: run.size(at) for at in looked_at}


def stand_ins(batches: "Batches") -> list[Encoded]:
    """Forget rows with answers of at most `sample_tokens`, in the place of samples."""
    count, longest = len(batches.forget), batches.config.sample_tokens
    rows = [batches.forget[number] for number in range(0, count, -(-count // STAND_INS))]
    encoded = [batches.template.encode(row, batches.config.max_length) for row in rows]
    return [Encoded(row.ids[: row.answer_start + longest], row.answer_start) for row in encoded]


@contextmanager
def with_stand_ins(batches: "Batches") -> Iterator[None]:
    """Inside, forget rows with answers of at most `sample_tokens` stand in for rows that the run has not drawn yet.

    Rows that are encoded inside do not count as used.
    """
    drawn, used = (batches.samples, batches.self_generated, batches.border), dict(batches.used)
    if not batches.samples:
        batches.samples = stand_ins(batches)
        batches.self_generated = batches.samples if batches.config.unasked_weight else []
        has_border = batches.border_prompts or batches.config.targets in WRITTEN  # see preserved.draw_border
        batches.border = batches.samples if has_border and batches.config.border_weight else []
    try:
        yield
    finally:
        (batches.samples, batches.self_generated, batches.border), batches.used = drawn, used


def answers_to_draw(config: TrainConfig, border: int) -> list[tuple[int, int]]:
    """(answers, forward passes for each token) of every draw of a contrastive method, in order, with so many border prompts given; see
    `Drawn.draw`."""
    latent = config.targets not in WRITTEN
    from_target, from_base = (config.samples, 2 if latent else 1), (config.samples, 1)
    first = [] if config.targets == "given" else [from_target]
    own = [from_base, from_target] if config.unasked_weight else []
    # The base's answers to the user's border prompts, or to those that it writes first.
    bordering = [(max(border, config.samples // 2), 1)] if border else [] if latent else [from_base, (config.samples // 2, 1)]
    return first + own + (bordering if config.border_weight else [])
