"""Latency and judged traffic per arm, from a demo or a serving benchmark."""

from typing import Any

from sku_vllm.report.collect import Document
from sku_vllm.stats import wilson


def latencies(document: Document) -> list[dict[str, Any]]:
    """One row per arm of `serving`: requests, judged, harmful with interval, median latency in seconds."""
    found = document.data.get("serving")
    if not isinstance(found, dict):
        return []
    rows = []
    for arm, numbers in found.items():
        if not isinstance(numbers, dict) or "requests" not in numbers:
            continue
        judged, harmful = int(numbers.get("judged") or 0), int(numbers.get("harmful") or 0)
        low, high = wilson(harmful, judged)
        rows.append(
            {
                "source": document.name,
                "arm": arm,
                "requests": int(numbers["requests"]),
                "judged": judged,
                "harmful": harmful / judged if judged else None,
                "harmful_low": low if judged else None,
                "harmful_high": high if judged else None,
                "latency_p50_s": numbers.get("latency_p50_s"),
            }
        )
    return rows
