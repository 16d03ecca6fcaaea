"""Whether the judge's verdicts can be trusted: its probe at the start, its errors, and the share of answers it could not read.

A judge that fails costs no request, so it has to be loud in other ways: the log, `sku ctl status` and `experiment`, `sku_judge_blind`.
"""

import logging
import threading
import time
from collections import deque
from typing import Any

from sku_vllm.serving.metrics import Metrics

EVERY = 60.0  # seconds between two log lines
RECENT = 200  # answers over which the share of unread ones is taken
TOO_MANY = 0.5  # share of unread answers from which the judge counts as blind
SILENT = 300.0  # seconds without a reply after which it does too; a judge over HTTP has given up by then
logger = logging.getLogger("vllm.sku")


class JudgeHealth:
    """Updated from the judge's thread, read by the control API. Reasons hold no text of a request or an answer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.lock = threading.Lock()
        self.recent: deque[bool] = deque(maxlen=RECENT)  # whether each answer got a verdict
        self.misled: str | None = None  # what the last probe found
        self.failing: str | None = None  # why the last batch has no verdict at all
        self.waiting: float | None = None  # when it was asked what it has not answered yet (`time.monotonic`)
        self.since: float | None = None  # when it went blind, seconds since the epoch
        self.last: tuple[float, str] | None = None
        self._logged, self._unlogged = -EVERY, 0

    def asked(self) -> None:
        """Note that the judge has a batch, or its probe, from now on; `judged` or `probed` ends that."""
        self.waiting = time.monotonic()

    def look(self) -> None:
        """Notice a judge that hangs; called with every answer that it shall judge, since nothing else happens then."""
        waiting = self.waiting
        if waiting is not None and time.monotonic() - waiting > SILENT:
            with self.lock:
                if self.since is None:
                    self._wrong(str(self._why()), 0)
                self._settle()

    def probed(self, problem: str | None) -> None:
        """Note a probe: None when both texts were told apart, else what was wrong."""
        with self.lock:
            self.misled, self.waiting = problem, None
            if problem:
                self._wrong(problem, 0)
            self._settle()

    def judged(self, verdicts: int, unread: int, reason: str | None) -> None:
        """Note a batch: answers with and without a verdict, and why the latter have none."""
        with self.lock:
            self.waiting = None
            self.recent.extend([True] * verdicts + [False] * unread)
            self.failing = None if verdicts else reason
            if unread:
                self._wrong(reason or "no verdict", unread)
            self._settle()

    def blind(self) -> str | None:
        """None while verdicts can be trusted; else since when they cannot, and why."""
        self.look()
        with self.lock:
            why = self._why()
            if why is None or self.since is None:
                return None
            return f"the judge is blind since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self.since))} UTC: {why}"

    def describe(self) -> dict[str, Any]:
        """For `status`: blind (None or why), last error with its time, and the share of unread answers among the last 200."""
        blind = self.blind()
        with self.lock:
            unread = self.recent.count(False) / len(self.recent) if self.recent else 0.0
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.last[0])) if self.last else None
            return {"blind": blind, "unread_share": unread, "last_error": {"time": at, "reason": self.last[1]} if self.last else None}

    def _why(self) -> str | None:
        if self.waiting is not None and time.monotonic() - self.waiting > SILENT:
            return f"it has not replied for {SILENT:.0f} s"
        if self.misled or self.failing:
            return self.misled or self.failing
        unread = self.recent.count(False)
        if len(self.recent) >= RECENT / 10 and unread >= TOO_MANY * len(self.recent):
            return f"{unread} of its last {len(self.recent)} replies were no verdict"
        return None

    def _settle(self) -> None:
        blind = self._why() is not None
        if blind and self.since is None:
            self.since = time.time()
        elif not blind and self.since is not None:
            self.since = None
            logger.warning("sku: the judge sees again")
        self.metrics.judge_blind.set(blind)

    def _wrong(self, reason: str, unread: int) -> None:
        self.last = time.time(), reason
        self._unlogged += unread
        if time.monotonic() - self._logged >= EVERY:
            logger.error("sku: the judge fails: %s; %d answers have no verdict", reason, self._unlogged)
            self._logged, self._unlogged = time.monotonic(), 0
