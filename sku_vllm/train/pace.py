"""How much time a run still needs: what is to come, in forward tokens and answers to draw, times what each has taken so far.

Open this file if the time left is wrong. What is to come is counted in `workload.py`.
"""

import time
from bisect import bisect_left
from collections import deque
from statistics import fmean
from typing import TYPE_CHECKING

from sku_vllm.train.workload import Kind, answers_to_draw, sizes, steps_by_kind, with_stand_ins

if TYPE_CHECKING:
    from sku_vllm.methods.method import Phase
    from sku_vllm.train.run import Run

LOOKED_AT = 48  # steps of each kind whose tokens are counted
RECENT = 30  # steps that a kind's seconds a token are measured on


class Pace:
    """Measures a run's steps and draws, and says how much time it still needs.

    Attributes:
        done, wanted: answers of the draw under way; 0 where there is none. in_draw: seconds left of it.
    """

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.measured: dict[Kind, deque[tuple[int, float]]] = {}
        self.last: Kind | None = None
        self.done = self.wanted = 0.0
        self._begun = self._heard = 0.0  # when the present draw began, and when it last said something
        self._drawn = [0.0, 0.0]  # answers and seconds of the draws that are over, over the whole run
        self._now = 0.0  # answers drawn at the present step, in draws that are over
        self._seconds_now = 0.0  # and the seconds that they took
        self._planned: tuple[list[Phase], int] | None = None
        self._steps: dict[Kind, list[int]] = {}
        self._tokens: dict[Kind, float] = {}

    def step(self, tokens: int, seconds: float) -> float:
        """Count the step that the run has just taken; returns its seconds without those of draws."""
        self._end_draw()
        at = self.run.at - 1
        own = max(seconds - self._seconds_now, 1e-9)
        self._now = self._seconds_now = 0.0
        kind = next(kind for kind, steps in self._plan().items() if _holds(steps, at))
        self.measured.setdefault(kind, deque(maxlen=RECENT)).append((tokens, own))
        self.last = kind
        return own

    def draw(self, done: float, wanted: int) -> None:
        """Count answers: `done` of `wanted` of one draw so far. 0 begins a draw."""
        if not done:
            self._end_draw()
            self._begun = time.perf_counter()
        self.done, self.wanted, self._heard = done, wanted, time.perf_counter()

    @property
    def in_draw(self) -> float | None:
        """Seconds left of the draw under way; None where nothing is known yet."""
        each = self._seconds_per_answer()
        return None if each is None else each * (self.wanted - self.done)

    def left(self) -> float | None:
        """Seconds that the run still needs; None before its first step."""
        total = 0.0
        for kind, steps in self._plan().items():
            if to_come := len(steps) - bisect_left(steps, self.run.at):
                rate = self._seconds_per_token(kind)
                if rate is None:
                    return None
                total += to_come * self._tokens[kind] * rate
        if answers := self._answers_left():
            each = self._seconds_per_answer()
            if each is None:
                return None
            total += answers * each
        return total

    def _plan(self) -> dict[Kind, list[int]]:
        """Steps by kind; counted again once rows were drawn, or if the run has changed its phases."""
        known = (self.run.phases, len(self.run.batches.samples) + len(self.run.batches.self_generated))
        if self._planned is None or self._planned[0] is not known[0] or self._planned[1] != known[1]:
            self._planned, self._steps = known, steps_by_kind(self.run)
            with with_stand_ins(self.run.batches):
                self._tokens = {kind: fmean(sizes(self.run, steps, LOOKED_AT).values()) for kind, steps in self._steps.items()}
        return self._steps

    def _seconds_per_token(self, kind: Kind) -> float | None:
        """Of this kind if it was measured, else of the nearest: the same terms without or with the adversary, or what ran last."""
        alike = [other for other in self.measured if other.terms == kind.terms]
        chosen = kind if kind in self.measured else alike[-1] if alike else self.last
        if chosen is None:
            return None
        recent = self.measured[chosen]
        return sum(seconds for _, seconds in recent) / sum(tokens for tokens, _ in recent)

    def _answers_left(self) -> float:
        """Answers of the draw under way and of those to come."""
        begin, coming = 0, False
        for phase in self.run.phases:
            coming = coming or (phase.sample_at is not None and begin + phase.sample_at >= self.run.at)
            begin += phase.steps
        planned = sum(answers for answers, _ in answers_to_draw(self.run.config, len(self.run.batches.border_prompts))) if coming else 0
        return max(self.wanted, planned - self._now) - self.done

    def _seconds_per_answer(self) -> float | None:
        """Measured; before the first answer a token of one is taken to cost, in each of two passes, what a token of training does."""
        answers = self._drawn[0] + self.done
        if answers:
            return (self._drawn[1] + (time.perf_counter() - self._begun if self.wanted else 0.0)) / answers
        rate = self._seconds_per_token(self.last) if self.last else None
        return None if rate is None else rate * 2 * self.run.config.sample_tokens

    def _end_draw(self) -> None:
        if self.wanted:
            seconds = self._heard - self._begun  # not until now: what came after it is not its own
            self._now, self._seconds_now = self._now + self.wanted, self._seconds_now + seconds
            self._drawn = [self._drawn[0] + self.wanted, self._drawn[1] + seconds]
        self.done = self.wanted = 0.0


def _holds(steps: list[int], at: int) -> bool:
    place = bisect_left(steps, at)
    return place < len(steps) and steps[place] == at
