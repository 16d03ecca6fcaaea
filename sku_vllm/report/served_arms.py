"""The report's part on served arms: traffic and latency from demo records, `sku bench serve` records and saved /metrics texts."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from sku_vllm.client.arm_metrics import parse, summarise
from sku_vllm.errors import DataError
from sku_vllm.records import Document
from sku_vllm.report.number_format import MISSING, interval, percent, seconds
from sku_vllm.report.page_parts import section, table
from sku_vllm.stats import wilson


def latencies(document: Document) -> list[dict[str, Any]]:
    """One row per arm of a record: the traffic that the server of `sku demo` counted, or the load test of `sku bench serve`."""
    traffic, load = document.data.get("serving"), document.data.get("arms")
    rows = [_row(document.name, arm, one) for arm, one in traffic.items() if "requests" in one] if isinstance(traffic, dict) else []
    if isinstance(load, dict) and document.command == "bench_serve":
        rows += [
            _row(
                document.name,
                arm,
                {"ttft_p50_s": one["ttft_ms"] / 1000, "itl_p50_s": one["itl_ms"] / 1000, "tokens_per_s": one["throughput"]},
            )
            for arm, one in load.items()
            if isinstance(one, dict) and {"ttft_ms", "itl_ms", "throughput"} <= one.keys()
        ]
    return rows


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """One row per arm, as from `latencies`, from a saved /metrics text (`curl SERVER/metrics > FILE`).

    Raises:
        DataError: the file cannot be read, or contains no arm.
    """
    try:
        found = parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"--metrics {file}: not a saved /metrics text ({error}); write one with curl http://SERVER/metrics > FILE"
        ) from error
    arms = dict.fromkeys(value for pairs in found.get("sku_requests_total", {}) for key, value in pairs if key == "arm")
    if not arms:
        raise DataError(f"--metrics {file}: has no sku_requests_total; save the /metrics of a server that sku serve started")
    return [_row(Path(file).name, arm, summarise(found, arm)) for arm in arms]


def _row(source: str, arm: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    judged, harmful = int(numbers.get("judged") or 0), int(numbers.get("harmful") or 0)
    low, high = wilson(harmful, judged) if judged else (None, None)
    rate = {"harmful": harmful / judged if judged else None, "harmful_low": low, "harmful_high": high}
    times = {key: numbers.get(key) for key in ("latency_p50_s", "ttft_p50_s", "itl_p50_s", "tokens_per_s")}
    return {"source": source, "arm": arm, "requests": numbers.get("requests"), "judged": judged, **rate, **times}


HEAD = ["arm", "requests", "judged", "harmful", "95 %", "median latency", "to first token", "between tokens", "tokens/s", "from"]


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row, as text, in the order of HEAD."""
    rate = MISSING if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
    requests = MISSING if row["requests"] is None else str(row["requests"])
    times = [seconds(row[key]) for key in ("latency_p50_s", "ttft_p50_s", "itl_p50_s")]
    return [row["arm"], requests, str(row["judged"]), percent(row["harmful"]), interval(row), *times, rate, row["source"]]


def serving_section(report: dict[str, Any]) -> str:
    """The section of the page, with one row per arm."""
    rows = [[escape(cell) for cell in cells(row)] for row in report["latency"]]
    said = "Medians. Arms of one LoRA-enabled engine are all slowed by LoRA, so their latencies are higher than those of separate servers."
    return section("Served side by side", said, table(HEAD, rows)) if rows else ""
