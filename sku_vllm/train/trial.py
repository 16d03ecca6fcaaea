"""Take a few real steps of each kind and draw a few answers, within a time limit: what `--dry-run` extrapolates from.

Where a whole step would take too long, a step of fewer rows is taken instead; time is then extrapolated by forward tokens, and memory by
the tokens of the longest forward pass. Open this file to change what is measured.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from sku_vllm.data import Encoded
from sku_vllm.train.memory import peak_memory, reset_peak
from sku_vllm.train.objective import inputs
from sku_vllm.train.packing import pack_rows
from sku_vllm.train.passes import Rows, split_into_passes
from sku_vllm.train.processes import main_process_says
from sku_vllm.train.run import Run
from sku_vllm.train.sampling import draw_answers
from sku_vllm.train.targets import NoRefusals
from sku_vllm.train.workload import Kind, answers_to_draw, sizes, stand_ins, terms_at

LOOKED_AT = 256  # steps of each kind whose tokens are counted
ENOUGH_SECONDS, FEWEST, MOST = 2.0, 3, 30  # whole steps of a kind are timed until they took so long; at least and at most so many
DRAWN = 64  # answers drawn to time a contrastive method's draws: one batch
FEW = 8  # answers drawn to see how long they are, where a batch would take too long
SHORT, TOKENS = 4, 2  # what a token of a batch costs is seen after prompts of SHORT tokens, from TOKENS further tokens


class Trial:
    """Measures the steps and draws of one run, which it changes: take a `Run` made for it.

    Attributes:
        extrapolated: a line for people about each kind of step of which no whole one was taken, and about draws.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = run.accelerator.device
        self.extrapolated: list[str] = []
        self._loaded = self._peak = peak_memory(self.device)
        self._points: dict[Kind, list[tuple[int, int]]] = {}  # tokens of the longest pass, and bytes at the peak
        self._partial: dict[Kind, int] = {}  # of each kind without a whole step, the tokens of the longest pass that it will have

    def steps(self, kind: Kind, steps: Sequence[int], seconds: float) -> tuple[float, float]:
        """Forward tokens of all `steps`, which are of one kind, and the seconds that they would take; measured within about `seconds`."""
        run, until = self.run, time.monotonic() + seconds
        if kind.attacked and run.adversary is None:
            run.adversary = run.new_adversary()  # made once in a run, so it is no part of a step's time
        tokens = sizes(run, steps, LOOKED_AT)
        mean = fmean(tokens.values())
        largest, smallest, middle = (
            min(tokens, key=lambda at: abs(tokens[at] - wanted)) for wanted in (max(tokens.values()), min(tokens.values()), mean)
        )
        fewest, whole = run.accelerator.num_processes, run.config.batch_size
        rate = self._measured(kind, smallest, fewest)
        if self._in_time(rate * (tokens[largest] + mean), until):
            self._measured(kind, largest, whole, fresh=False)  # decides the peak of memory, and warms caches
            return mean * len(steps), mean * len(steps) * self._seconds_per_token(steps, until)
        # More rows cost less each, but the clocks of several processes differ, and all have to take as many.
        affordable = int(whole * (until - time.monotonic()) / (rate * mean)) if fewest == 1 else fewest
        rows = min(max(affordable, fewest), whole)
        if self._in_time(rate * tokens[middle] * rows / whole, until):
            rate = self._measured(kind, middle, rows)
        self._partial[kind] = self._longest_pass(largest)
        self.extrapolated.append(f"{len(steps)} steps{' with the adversary' * kind.attacked}: from one of {rows} of {whole} rows")
        return mean * len(steps), mean * len(steps) * rate

    def draws(self, seconds: float) -> float:
        """The seconds that all draws of the run would take; measured within about `seconds`.

        Afterwards the run has rows that stand for those that it will draw.
        """
        run, config, until = self.run, self.run.config, time.monotonic() + seconds
        passes = sum(answers * passes for answers, passes in answers_to_draw(config, len(run.batches.border_prompts))) / config.samples
        asked = sorted(map(list, run.batches.forget_of), key=len)
        batch = min(DRAWN, config.samples)
        in_prompt, in_batch = self._seconds_of_draws(asked, batch)
        prefill = batch * fmean(map(len, asked)) * in_prompt
        if self._in_time((prefill + config.sample_tokens * in_batch) * passes, until):
            begun = time.perf_counter()
            run.config = replace(config, samples=batch)
            with suppress(NoRefusals):  # no verdict here: the harmful adapter is not trained yet
                run.drawn.draw(run.config, run.bare.gathered, looking=False)
            run.config = config
            run.batches.samples = run.batches.samples or stand_ins(run.batches)
            return (time.perf_counter() - begun) * config.samples / batch
        drawn = self._draw(_median(asked), FEW, config.sample_tokens, run.batches.template.stop_ids, beta=0.0)
        run.batches.samples = drawn
        run.batches.self_generated = drawn if config.unasked_weight else []
        longest = max(len(row.answer_ids) for row in drawn)
        self.extrapolated.append(f"draws of {config.samples} answers: from {FEW} answers, and {TOKENS} tokens of {batch}")
        return (prefill + longest * in_batch) * passes * config.samples / batch

    def peak(self) -> int:
        """Bytes at the peak of the run: measured, or where a kind had no whole step, extrapolated to its longest forward pass."""
        pairs = [
            (more[0] - less[0], (more[1] - less[1]) / (more[0] - less[0]))
            for points in self._points.values()
            for less in points
            for more in points
            if more[0] > less[0]
        ]
        peak = max(self._peak, peak_memory(self.device))
        for kind, longest in self._partial.items():
            tokens, used = max(self._points[kind])
            each = max(pairs)[1] if pairs else (used - self._loaded) / tokens
            peak = max(peak, round(used + each * (longest - tokens)))
        return peak

    def _measured(self, kind: Kind, at: int, rows: int, *, fresh: bool = True) -> float:
        """Take step `at` with so many rows and note its peak of memory; returns its seconds a forward token.

        fresh: give memory back first, so that what earlier steps needed does not count.
        """
        batches, whole = self.run.batches, self.run.batches.config
        batches.config = replace(whole, batch_size=rows)
        if fresh:
            self._peak = max(self._peak, peak_memory(self.device))
            reset_peak(self.device)
        try:
            longest = self._longest_pass(at)
            entry = self._step(at)
        finally:
            batches.config = whole
        self._points.setdefault(kind, []).append((longest, peak_memory(self.device)))
        return float(entry["seconds"] / entry["tokens"])

    def _step(self, at: int) -> dict[str, Any]:
        self.run.at = at
        return self.run.step()

    def _seconds_per_token(self, steps: Sequence[int], until: float) -> float:
        """Measured over some whole steps in a row."""
        tokens = seconds = 0.0
        for taken in range(1, MOST + 1):
            entry = self._step(steps[taken % len(steps)])
            tokens, seconds = tokens + entry["tokens"], seconds + entry["seconds"]
            if not self._in_time(0.0, until) or main_process_says(self.run.accelerator, taken >= FEWEST and seconds > ENOUGH_SECONDS):
                break
        return seconds / tokens

    def _seconds_of_draws(self, prompts: Sequence[list[int]], batch: int) -> tuple[float, float]:
        """Seconds that a token of a prompt takes in one forward pass, and those that a token of every answer of a batch takes."""
        short, some = [ids[-SHORT:] for ids in prompts], _median(prompts)
        self._draw(short, 2, 1)  # warms caches
        one, more, whole = (
            self._seconds(partial(self._draw, *asked)) for asked in ((short, batch, 1), (short, batch, 1 + TOKENS), (some, len(some), 1))
        )
        return whole / 2 / sum(map(len, some)), max(0.0, more - one) / 2 / TOKENS

    def _draw(
        self, prompts: Sequence[list[int]], answers: int, tokens: int, stop_ids: Collection[int] = (), beta: float | None = None
    ) -> list[Encoded]:
        config = replace(self.run.config, samples=answers, sample_tokens=tokens)
        drawn: list[Encoded] = self.run.bare.gathered(partial(draw_answers, self.run.passes, prompts, config, stop_ids, beta=beta))
        return drawn

    @staticmethod
    def _seconds(call: partial[Any]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def _longest_pass(self, at: int) -> int:
        """Tokens that the longest forward pass of step `at` computes, padding included where rows are padded."""
        terms, batches = terms_at(self.run, at), self.run.batches
        rows: Rows = {kind: batches.rows(kind, at) for kind in {term.rows for term in terms}}
        packed, tokens = self.run.passes.packed, []
        for pieces in split_into_passes(terms, rows, self.run.config.tokens_per_pass, packed=packed):
            ids = [inputs(piece.row) for piece in pieces]
            sides = [piece.side for piece in pieces]
            tokens.append(pack_rows(ids, sides).ids.shape[1] if packed else len(ids) * max(map(len, ids)))
        return max(tokens)

    def _in_time(self, seconds: float, until: float) -> bool:
        return main_process_says(self.run.accelerator, seconds < until - time.monotonic())


def _median(prompts: Sequence[list[int]]) -> list[list[int]]:
    """The FEW prompts of middle length, of prompts in the order of their length."""
    begin = max(0, (len(prompts) - FEW) // 2)
    return list(prompts[begin : begin + FEW])
