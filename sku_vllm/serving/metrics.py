"""What an operator watches, per arm, on vLLM's own /metrics. Rates are PromQL's business."""

import functools

from prometheus_client import Counter, Gauge, Histogram

from sku_vllm import __version__

# vLLM's own families (vllm/v1/metrics/buckets.py), so that one panel can show both.
LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
OUTCOMES = ("ok", "cancelled", "rejected", "error")


class Metrics:
    """One process's instruments; several API servers are merged by prometheus_client's multiprocess mode."""

    def __init__(self) -> None:
        arm = ["arm"]
        self.requests = Counter("sku_requests", "Requests by arm and outcome.", ["arm", "outcome"])
        self.prompt_tokens = Counter("sku_prompt_tokens", "Prompt tokens by arm.", arm)
        self.generation_tokens = Counter("sku_generation_tokens", "Generated tokens by arm.", arm)
        self.judged = Counter("sku_judged", "Answers judged.", arm)
        self.harmful = Counter("sku_harmful", "Judged answers found harmful.", arm)
        self.refused = Counter("sku_refused", "Judged answers that are refusals.", arm)
        self.dropped = Counter("sku_judge_dropped", "Sampled answers dropped because the judge's queue was full.", arm)
        self.judge_errors = Counter("sku_judge_errors", "Sampled answers the judge failed on.", arm)
        self.swaps = Counter("sku_swaps", "Changes of what the engine serves.", ["outcome"])
        self.latency = Histogram("sku_request_latency_seconds", "Arrival to last token.", arm, buckets=LATENCY)
        self.first_token = Histogram("sku_time_to_first_token_seconds", "Arrival to first token.", arm, buckets=FIRST_TOKEN)
        self.between_tokens = Histogram(
            "sku_inter_token_latency_seconds", "Between a choice's tokens; those that came together share it.", arm, buckets=BETWEEN_TOKENS
        )
        self.queue = Histogram("sku_queue_seconds", "Waiting in the engine's queue.", arm, buckets=LATENCY)
        self.decode = Histogram("sku_decode_seconds", "First to last token.", arm, buckets=LATENCY)
        self.judge_seconds = Histogram("sku_judge_seconds", "Judging one batch of answers.", arm, buckets=LATENCY)
        self.swap_seconds = Histogram("sku_swap_seconds", "From weights at hand to answers from them.", buckets=FIRST_TOKEN)
        # Every process knows the whole table, so the most recent value is the right merge.
        self.weight = Gauge("sku_arm_weight", "Share of the alias's traffic.", arm, multiprocess_mode="mostrecent")
        self.up = Gauge("sku_plugin_up", "1 while the plugin routes in this server.", ["version"], multiprocess_mode="max")
        self._known: set[str] = set()

    def show_arms(self, split: dict[str, float]) -> None:
        """Export each arm from the start (0 is a value), and 0 for one that is gone."""
        for name in split:
            if name not in self._known:
                self._known.add(name)
                for counter in (
                    self.prompt_tokens, self.generation_tokens, self.judged, self.harmful, self.refused, self.dropped, self.judge_errors,
                ):
                    counter.labels(name)
                for outcome in OUTCOMES:
                    self.requests.labels(name, outcome)
        for name in self._known:
            self.weight.labels(name).set(split.get(name, 0.0))

    def set_up(self) -> None:
        self.up.labels(__version__).set(1)


@functools.cache
def metrics() -> Metrics:
    """This process's instruments, made on first use: prometheus_client decides on multiprocess mode when it is imported."""
    return Metrics()
