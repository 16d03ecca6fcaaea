"""The Prometheus metrics of every arm, exported on vLLM's own /metrics. They are counts and histograms; rates are left to queries.

Open this file to add a metric; `deploy/grafana` shows each of them.
"""

import contextlib
import functools
import secrets
import time
import warnings

from prometheus_client import Counter, Gauge, Histogram

from sku_vllm.judges import Verdict
from sku_vllm.serving.tally import Tally, names_of
from sku_vllm.version import __version__

# Marks the verdicts of one process, so that those from before a restart are series of their own and can be added.
# No two processes may share it: the pods of one deployment start in the same second with the same process ids.
RUN = f"{int(time.time()):x}-{secrets.token_hex(4)}"

# The bucket limits (seconds) of vLLM's own metrics (vllm/v1/metrics/buckets.py), so that one Grafana panel can show both.
LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
OUTCOMES = ("ok", "cancelled", "rejected", "error")


class Metrics:
    """The metrics of one process; prometheus_client's multiprocess mode merges those of several API servers."""

    def __init__(self) -> None:
        arm, asked = ["arm"], ["arm", "shadow"]
        self.requests = Counter("sku_requests", "Requests by arm and outcome.", ["arm", "outcome", "shadow"])
        self.prompt_tokens = Counter("sku_prompt_tokens", "Prompt tokens by arm.", asked)
        self.generation_tokens = Counter("sku_generation_tokens", "Generated tokens by arm.", asked)
        self.length_limited = Counter("sku_length_limited", "Answers that ran into their length limit.", arm)
        self.judged = Counter("sku_judged", "Answers judged.", arm)
        self.harmful = Counter("sku_harmful", "Judged answers found harmful.", arm)
        self.refused = Counter("sku_refused", "Judged answers that are refusals.", arm)
        self.dropped = Counter("sku_judge_dropped", "Sampled answers dropped because the judge's queue was full.", arm)
        self.judge_errors = Counter("sku_judge_errors", "Sampled answers the judge failed on.", arm)
        self.verdicts = Counter(
            "sku_verdicts",
            "Judged answers by version of the arm, bucket of the sticky key and label; the experiment is made of them.",
            ["arm", "version", "bucket", "label", "run"],
        )
        self.judge_blind = Gauge("sku_judge_blind", "1 while the judge's verdicts cannot be trusted.", multiprocess_mode="max")
        self.swaps = Counter("sku_swaps", "Changes of what the engine serves.", ["outcome"])
        self.latency = Histogram("sku_request_latency_seconds", "Arrival to last token.", asked, buckets=LATENCY)
        self.first_token = Histogram("sku_time_to_first_token_seconds", "Arrival to first token.", asked, buckets=FIRST_TOKEN)
        self.between_tokens = Histogram(
            "sku_inter_token_latency_seconds",
            "Between a choice's tokens; those that came together share it.",
            asked,
            buckets=BETWEEN_TOKENS,
        )
        self.queue = Histogram("sku_queue_seconds", "Waiting in the engine's queue.", asked, buckets=LATENCY)
        self.decode = Histogram("sku_decode_seconds", "First to last token.", asked, buckets=LATENCY)
        self.judge_seconds = Histogram("sku_judge_seconds", "Judging one batch of answers.", arm, buckets=LATENCY)
        self.swap_seconds = Histogram("sku_swap_seconds", "From weights at hand to answers from them.", buckets=FIRST_TOKEN)
        # Every process exports the weight of every arm, so of several values the most recent one is right.
        self.weight = Gauge("sku_arm_weight", "Share of the alias's traffic.", arm, multiprocess_mode="mostrecent")
        self.up = Gauge("sku_plugin_up", "1 while the plugin routes in this server.", ["version"], multiprocess_mode="max")
        self._known: set[str] = set()

    def show_arms(self, split: dict[str, float]) -> None:
        """Export the arms' weights; a new arm's counters begin at 0 at once, and an arm that was removed gets weight 0."""
        for name in split:
            if name not in self._known:
                self._known.add(name)
                for counter in (self.length_limited, self.judged, self.harmful, self.refused, self.dropped, self.judge_errors):
                    counter.labels(name)
                for counter in (self.prompt_tokens, self.generation_tokens):
                    counter.labels(name, "no")
                for outcome in OUTCOMES:
                    self.requests.labels(name, outcome, "no")
        for name in self._known:
            self.weight.labels(name).set(split.get(name, 0.0))

    def count_verdict(self, arm: str, version: str, bucket: int, verdict: Verdict) -> None:
        """Count one verdict of the experiment."""
        for name in names_of(verdict):
            self.verdicts.labels(arm, version, bucket, name, RUN).inc()

    def forget_verdicts(self, arm: str, version: str, tally: Tally) -> None:
        """Export the verdicts on a version no more that was replaced: the series of all versions would fill the memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with several API servers prometheus_client keeps them, and says so
            for label, counts in tally.labels.items():
                for bucket in (number for number, count in enumerate(counts) if count):
                    with contextlib.suppress(KeyError):
                        self.verdicts.remove(arm, version, bucket, label, RUN)

    def set_up(self) -> None:
        """Set `sku_plugin_up` to 1."""
        self.up.labels(__version__).set(1)


@functools.cache
def metrics() -> Metrics:
    """The metrics of this process, created once, on first use.

    prometheus_client registers each name only once per process, and reads its multiprocess setting when it is imported.
    """
    return Metrics()
