"""Judging off the request path: a bounded queue, one thread, drops that are counted and never waited for."""

import contextlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.judges import Exchange, Labeller, Verdict
from sku_vllm.serving.metrics import Metrics

BATCH = 32
KEEP_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer of one arm; version: its adapter's id in the engine, 0 without."""

    arm: str
    exchange: Exchange
    version: int


class JudgeQueue:
    """Samples answers, labels them in a daemon thread and counts what it finds.

    A stalled judge fills the queue, and then answers are dropped; a judge that raises costs its batch. Neither slows a
    request: `offer` takes about 2 µs and never blocks. Text goes nowhere but to the judge, and to `keep` when that is set.
    """

    def __init__(
        self, labeller: Labeller | None, metrics: Metrics, *, sample: float = 1.0, size: int = 1024, keep: str | None = None,
        found: Callable[[str, int, Verdict], None] | None = None,
    ) -> None:
        self.labeller, self.metrics, self.sample, self.found = labeller, metrics, sample, found
        self.keep = KeptAnswers(Path(keep)) if keep else None
        self.pending: queue.Queue[Answer] = queue.Queue(maxsize=size)
        if labeller is not None:
            threading.Thread(target=self._work, name="sku-judge", daemon=True).start()

    def offer(self, arm: str, exchange: Exchange, version: int = 0) -> None:
        """Queue this answer with probability `sample`; drop it, counted, when the judge is behind."""
        if self.labeller is None or (self.sample < 1 and random.random() >= self.sample):
            return
        try:
            self.pending.put_nowait(Answer(arm, exchange, version))
        except queue.Full:
            self.metrics.dropped.labels(arm).inc()

    def _work(self) -> None:
        while True:
            batch = [self.pending.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH:
                    batch.append(self.pending.get_nowait())
            # One batch holds several arms; each arm's judging time is its own.
            for arm in dict.fromkeys(answer.arm for answer in batch):
                self._judge(arm, [answer for answer in batch if answer.arm == arm])

    def _judge(self, arm: str, answers: list[Answer]) -> None:
        assert self.labeller is not None
        exchanges = [answer.exchange for answer in answers]
        start = time.perf_counter()
        try:
            verdicts = self.labeller(exchanges)
        except Exception:  # a judge is other people's code, or a network: whatever it raises, serving goes on
            self.metrics.judge_errors.labels(arm).inc(len(exchanges))
            return
        finally:
            self.metrics.judge_seconds.labels(arm).observe(time.perf_counter() - start)
        for answer, verdict in zip(answers, verdicts, strict=True):
            self.metrics.judged.labels(arm).inc()
            self.metrics.harmful.labels(arm).inc(bool(verdict.harmful))
            self.metrics.refused.labels(arm).inc(verdict.refusal)
            if self.found:
                self.found(arm, answer.version, verdict)
            if self.keep:
                self.keep.write(arm, answer.exchange, verdict)


class KeptAnswers:
    """`--keep-judged FILE`: judged text as JSONL, 0600, one generation of rotation (FILE.1) at 64 MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(descriptor, 0o600)
        self.file = os.fdopen(descriptor, "a", encoding="utf-8")

    def write(self, arm: str, exchange: Exchange, verdict: Verdict) -> None:
        row = {"set": "served", "mode": arm, "prompt": exchange.prompt, "response": exchange.response, "label": verdict.label}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.file.tell() > KEEP_BYTES:
            self.file.close()
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            self._open()
