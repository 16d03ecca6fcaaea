"""Reads a server's counters and latencies per arm, from its /metrics or from a Prometheus that scrapes it."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from sku_vllm.client.http import fetch, fetch_json
from sku_vllm.errors import RunError

# {sample name: {sorted label pairs: value}}
Metrics = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
TIMES = {
    "latency_p50_s": "sku_request_latency_seconds",
    "ttft_p50_s": "sku_time_to_first_token_seconds",
    "itl_p50_s": "sku_inter_token_latency_seconds",
}
# The counters of `sku monitor`'s series `traffic:ARM`: judged answers, and the harmful ones among them.
COUNTERS = {"n": "sku_judged_total", "hits": "sku_harmful_total"}


def parse(text: str) -> Metrics:
    """Parse a /metrics text into {sample name: {sorted label pairs: value}}.

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


def arm_counters(*, metrics: str | None = None, prometheus: str | None = None, timeout: float = 30) -> dict[str, dict[str, int]]:
    """{arm: {"hits", "n"}} as counted since the server started, from its `/metrics` or from a Prometheus that scrapes it.

    Raises:
        RunError: the address does not answer, or answers something else.
    """
    found: dict[str, dict[str, int]] = {}
    samples = _scraped(metrics, timeout) if metrics else _queried(str(prometheus), timeout)
    for field, arm, value in samples:
        counts = found.setdefault(arm, {"hits": 0, "n": 0})
        counts[field] += int(value) if math.isfinite(value) else 0
    return found


def _scraped(url: str, timeout: float) -> list[tuple[str, str, float]]:
    try:
        found = parse(fetch(url, timeout=timeout))
    except ValueError as error:
        raise RunError(f"{url}: not Prometheus text; give the address of the server's /metrics") from error
    samples = [(field, labels, value) for field, name in COUNTERS.items() for labels, value in found.get(name, {}).items()]
    return [(field, dict(labels).get("arm", ""), value) for field, labels, value in samples]


def _queried(url: str, timeout: float) -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = []
    for field, name in COUNTERS.items():
        query = urlencode({"query": f"sum by (arm) ({name})"})
        address = f"{url.rstrip('/')}/api/v1/query?{query}"
        try:
            reply = fetch_json(address, timeout=timeout)
            found += [(field, row["metric"].get("arm", ""), float(row["value"][1])) for row in reply["data"]["result"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(
                f"{address}: not a Prometheus query API; give the address of Prometheus itself, such as http://host:9090"
            ) from error
    return found
