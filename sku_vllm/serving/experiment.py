"""The A/B in numbers: what was judged and how long requests took, per arm, since this process started."""

import threading
from collections import Counter, defaultdict, deque

from sku_vllm.judges import Verdict

RECENT = 4096


class Experiment:
    """Counts and recent latencies by arm. Written from the judge's thread and the event loop."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.latency: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.first_token: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def judged(self, arm: str, verdict: Verdict) -> None:
        with self.lock:
            counts = self.counts[arm]
            counts["judged"] += 1
            counts[verdict.label] += 1

    def timed(self, arm: str, latency: float, first_token: float) -> None:
        with self.lock:
            self.latency[arm].append(latency)
            self.first_token[arm].append(first_token)
