"""What one answer was like: its outcome, tokens, text and times, collected as it passes and then counted and offered to the judge.

Answers of this engine come as vLLM's outputs (`Observation.add`), those of other servers as JSON (`json_answer.py`).
"""

import time
from dataclasses import dataclass, field
from typing import Any

from sku_vllm.judges import Exchange
from sku_vllm.serving.route import Route
from sku_vllm.serving.runtime import Runtime


@dataclass(slots=True)
class Observation:
    """Outcome, tokens, text and times of one engine request, collected from its outputs.

    Works with streamed deltas, cumulative outputs and final-only outputs, for any number of choices `n`. index: which of the HTTP
    request's prompts it answers. Times are seconds (`time.perf_counter`); queued and decode are None where vLLM reports no times.
    """

    route: Route
    index: int
    params: Any
    outcome: str = "error"
    prompt_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    queued: float | None = None
    decode: float | None = None
    texts: dict[int, list[str]] = field(default_factory=dict)
    arrived: dict[int, tuple[int, float]] = field(default_factory=dict)  # by choice: tokens so far, and when the last one came
    gaps: list[float] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)  # choices that their length limit ended
    failed: bool = False

    def add(self, output: Any) -> None:
        """Note the engine's next output: tokens, text and times of each choice."""
        self.last = time.perf_counter()
        if self.prompt_tokens == 0 and output.prompt_token_ids:
            self.prompt_tokens = len(output.prompt_token_ids)
        cumulative = getattr(getattr(self.params, "output_kind", None), "name", "") == "CUMULATIVE"
        for choice in output.outputs:
            before, then = self.arrived.get(choice.index, (0, 0.0))
            new = len(choice.token_ids) - before if cumulative else len(choice.token_ids)
            if new > 0:
                self.first = self.first or self.last
                self.arrived[choice.index] = before + new, self.last
                self.tokens += new
                if before:
                    self.gaps += [(self.last - then) / new] * new
            if cumulative:
                self.texts[choice.index] = [choice.text]
            else:
                self.texts.setdefault(choice.index, []).append(choice.text)
            if choice.finish_reason in ("stop", "length"):
                self.finished.add(choice.index)
            if choice.finish_reason == "length":
                self.cut.add(choice.index)
            self.failed = self.failed or choice.finish_reason == "error"
        self._engine_times(getattr(output, "metrics", None))

    def _engine_times(self, stats: Any) -> None:
        """Take queue and decode time from vLLM's statistics, where there are any: a final-only output tells nothing of its first token."""
        if stats is None or not getattr(stats, "first_token_ts", 0):
            return
        self.queued = max(0.0, stats.scheduled_ts - stats.queued_ts)
        self.decode = max(0.0, stats.last_token_ts - stats.first_token_ts)

    def finish(self, runtime: Runtime) -> None:
        """Update the metrics, and hand finished answers to the judge's queue."""
        arm, shadow, metrics = self.route.arm, shadow_label(self.route.shadow), runtime.metrics
        metrics.requests.labels(arm, self.outcome, shadow).inc()
        metrics.prompt_tokens.labels(arm, shadow).inc(self.prompt_tokens)
        metrics.generation_tokens.labels(arm, shadow).inc(self.tokens)
        if self.first is not None and self.outcome == "ok":
            self._time(runtime)
        if self.outcome == "ok":
            metrics.length_limited.labels(arm).inc(len(self.cut))
            runtime.experiment.ended(arm, len(self.finished), len(self.cut), self.route.version)
            asked = self.route.conversations or [()]
            turns = asked[min(self.index, len(asked) - 1)]
            for choice in sorted(self.finished):
                exchange = Exchange.of(turns, "".join(self.texts[choice]))
                runtime.judge.offer(arm, exchange, self.route.version, self.route.bucket)

    def _time(self, runtime: Runtime) -> None:
        arm, shadow, metrics = self.route.arm, shadow_label(self.route.shadow), runtime.metrics
        latency = self.last - self.route.arrived
        decode = self.decode if self.decode is not None else self.last - (self.first or self.last)
        first = min((self.first or self.last) - self.route.arrived, max(0.0, latency - decode))
        metrics.latency.labels(arm, shadow).observe(latency)
        metrics.first_token.labels(arm, shadow).observe(first)
        metrics.decode.labels(arm, shadow).observe(decode)
        if self.queued is not None:
            metrics.queue.labels(arm, shadow).observe(self.queued)
        for gap in self._all_gaps(decode):
            metrics.between_tokens.labels(arm, shadow).observe(gap)
        if not self.route.shadow:  # a replay has no client that waits for it
            runtime.experiment.timed(arm, latency, first, self.route.version)

    def _all_gaps(self, decode: float) -> list[float]:
        """Seconds before every token but the first of each choice, as in vLLM's metric.

        Tokens that arrived in one output get an equal share of the decode time that no gap accounts for.
        """
        choices = max(1, len(self.texts))
        together = self.tokens - choices - len(self.gaps)
        if together <= 0:
            return self.gaps
        return [*self.gaps, *[max(0.0, decode * choices - sum(self.gaps)) / together] * together]


def shadow_label(shadow: bool) -> str:
    """The value of the label `shadow`: whether a request is a replay of --shadow, which no client waits for."""
    return "yes" if shadow else "no"
