"""The server's per-arm metrics read back: counts, and medians out of histogram buckets."""

from collections.abc import Mapping
from typing import Any

# {sample name: {sorted label pairs: value}}
Metrics = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
TIMES = {
    "latency_p50_s": "sku_request_latency_seconds",
    "ttft_p50_s": "sku_time_to_first_token_seconds",
    "itl_p50_s": "sku_inter_token_latency_seconds",
}


def parse(text: str) -> Metrics:
    """A /metrics text.

    Raises:
        ValueError: it is not Prometheus text.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def summarise(metrics: Metrics, arm: str) -> dict[str, Any]:
    """One arm's row of the A/B table: requests, judged, harmful, refused, and median seconds (None where nothing was timed)."""

    def samples(name: str) -> list[tuple[dict[str, str], float]]:
        return [(dict(labels), value) for labels, value in metrics.get(name, {}).items() if ("arm", arm) in labels]

    def total(name: str) -> int:
        return int(sum(value for _, value in samples(name)))

    def median(name: str) -> float | None:
        buckets: dict[float, float] = {}
        for labels, value in samples(f"{name}_bucket"):
            buckets[float(labels["le"])] = buckets.get(float(labels["le"]), 0.0) + value
        return histogram_quantile(buckets, 0.5)

    counts = {name: total(f"sku_{name}_total") for name in ("requests", "judged", "harmful", "refused")}
    return counts | {key: median(name) for key, name in TIMES.items()}


def histogram_quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """PromQL's histogram_quantile over {upper edge: cumulative count}: linear within a bucket, None when empty."""
    edges = sorted(buckets)
    if not edges or buckets[edges[-1]] == 0:
        return None
    rank, lower, below = q * buckets[edges[-1]], 0.0, 0.0
    for edge in edges:
        if buckets[edge] >= rank:
            if edge == float("inf"):
                return lower
            return lower + (edge - lower) * (rank - below) / max(buckets[edge] - below, 1e-12)
        lower, below = edge, buckets[edge]
    return lower
