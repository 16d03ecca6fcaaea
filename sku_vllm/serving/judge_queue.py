"""Sends served answers to the judge through a bounded queue and one thread. When the queue is full, answers are dropped and counted.

Open this file to change which answers are judged, counted and stored; the judge itself runs in `judge_process.py`.
"""

import contextlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.errors import JudgeError
from sku_vllm.judges import Exchange, Verdict
from sku_vllm.serving.judge_health import EVERY, JudgeHealth
from sku_vllm.serving.metrics import Metrics

BATCH = 32  # most answers judged together
PROBE_AGAIN = 60.0  # seconds after which a judge that failed its probe is tried again
KEEP_BYTES = 64 * 2**20  # size at which the --keep-judged file is rotated
logger = logging.getLogger("vllm.sku")


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer of one version of an arm; bucket: of the sticky key that asked."""

    arm: str
    exchange: Exchange
    version: str
    bucket: int


class JudgeQueue:
    """Samples answers, labels them in a daemon thread and counts what it finds.

    While the judge is stalled the queue fills, and then answers are dropped; when the judge raises, its batch has no verdicts. Neither
    slows a request: `offer` takes about 2 µs and never blocks. `health` knows whether verdicts can be trusted. The text is given to the
    judge, and written to `keep` if that is set.

    Args:
        labeller: None judges nothing. sample: share of answers judged. size: most answers that may wait. keep: file for judged text.
        found: called in the judge's thread with each judged answer and its verdict.
    """

    def __init__(
        self,
        labeller: Callable[[Sequence[Exchange]], Sequence[Verdict | None]] | None,
        metrics: Metrics,
        *,
        sample: float = 1.0,
        size: int = 1024,
        keep: str | None = None,
        found: Callable[[Answer, Verdict], None] | None = None,
    ) -> None:
        self.labeller, self.metrics, self.sample, self.found = labeller, metrics, sample, found
        self.keep = KeptAnswers(Path(keep)) if keep else None
        self.health = JudgeHealth(metrics)
        self.complained = -EVERY
        self.pending: queue.Queue[Answer] = queue.Queue(maxsize=size)
        if labeller is not None:
            threading.Thread(target=self._work, name="sku-judge", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Answers without a verdict yet: those in the queue and those being judged."""
        return self.pending.unfinished_tasks

    def offer(self, arm: str, exchange: Exchange, version: str = "", bucket: int = 0) -> None:
        """Queue this answer with probability `sample`. When the queue is full it is dropped and counted."""
        if self.labeller is None or (self.sample < 1 and random.random() >= self.sample):
            return
        self.health.look()
        try:
            self.pending.put_nowait(Answer(arm, exchange, version, bucket))
        except queue.Full:
            self.metrics.dropped.labels(arm).inc()

    def _work(self) -> None:
        passed, tried = self._probe(), time.monotonic()
        while True:
            if not passed and time.monotonic() - tried >= PROBE_AGAIN:
                passed, tried = self._probe(), time.monotonic()
            try:
                batch = [self.pending.get(timeout=None if passed else PROBE_AGAIN)]
            except queue.Empty:
                continue
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH:
                    batch.append(self.pending.get_nowait())
            # A batch may mix arms; they are judged one by one, since judging time is measured per arm.
            for arm in dict.fromkeys(answer.arm for answer in batch):
                self._judge(arm, [answer for answer in batch if answer.arm == arm])
            for _ in batch:
                self.pending.task_done()

    def _probe(self) -> bool:
        """Try the judge on two fixed texts. Returns whether it passed."""
        probe = getattr(self.labeller, "probe", None)
        if probe is None:
            return True
        self.health.asked()
        try:
            problem = probe()
        except Exception as error:
            problem = str(error) if isinstance(error, JudgeError) else type(error).__name__
        self.health.probed(problem)
        return problem is None

    def _judge(self, arm: str, answers: list[Answer]) -> None:
        assert self.labeller is not None
        verdicts: Sequence[Verdict | None] = [None] * len(answers)
        reason = "its reply was no verdict"
        start = time.perf_counter()
        self.health.asked()
        try:
            said = self.labeller([answer.exchange for answer in answers])
            if len(said) != len(answers):
                raise JudgeError(f"it gave {len(said)} verdicts on {len(answers)} answers")
            verdicts = said
        except Exception as error:  # a judge may be third-party code or a network call; serving goes on whatever it raises
            reason = str(error) if isinstance(error, JudgeError) else type(error).__name__
        finally:
            self.metrics.judge_seconds.labels(arm).observe(time.perf_counter() - start)
        found = [(answer, verdict) for answer, verdict in zip(answers, verdicts, strict=True) if verdict is not None]
        self.metrics.judge_errors.labels(arm).inc(len(answers) - len(found))
        self.health.judged(len(found), len(answers) - len(found), reason)
        for answer, verdict in found:
            self.metrics.judged.labels(arm).inc()
            self.metrics.harmful.labels(arm).inc(bool(verdict.harmful))
            self.metrics.refused.labels(arm).inc(verdict.refusal)
            try:
                self._note(answer, verdict)
            except Exception as error:  # such as a full disk; without this thread no answer would ever be judged again
                self._complain(error)

    def _note(self, answer: Answer, verdict: Verdict) -> None:
        try:
            if self.found:
                self.found(answer, verdict)
        finally:
            if self.keep:
                self.keep.write(answer.arm, answer.exchange, verdict)

    def _complain(self, error: Exception) -> None:
        """Log what could not be done with a verdict, once a minute at most; the message may quote an answer, so only its kind."""
        if time.monotonic() - self.complained >= EVERY:
            self.complained = time.monotonic()
            why = getattr(error, "strerror", None) or type(error).__name__
            logger.error("sku: a verdict was counted, but not kept, or the guard could not act on it: %s", why)


class KeptAnswers:
    """`--keep-judged FILE`: judged text as JSONL, mode 0600. At 64 MiB the file is renamed to FILE.1, replacing an older FILE.1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(descriptor, 0o600)
        # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's escape of it.
        self.file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def write(self, arm: str, exchange: Exchange, verdict: Verdict) -> None:
        """Append one row; afterwards begin a new file where this one has grown too large."""
        told = {"messages": exchange.turns} if exchange.turns else {}
        row = {"set": "served", "mode": arm, **told, "prompt": exchange.prompt, "response": exchange.response, "label": verdict.label}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.file.tell() > KEEP_BYTES:
            self.file.close()
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            self._open()
