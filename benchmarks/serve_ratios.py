"""Throughput of two ways to ask one server, as a ratio with its interval; and of every way to serve, side by side."""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_servers import Servers
from sku_vllm.cli.options import log
from sku_vllm.stats.signed_rank import hodges_lehmann

Run = Callable[[], dict[str, Any]]


def contenders(part: str, servers: Servers, load: Any) -> tuple[Run, Run]:
    """What is compared, both against one server, so that nothing else differs; judged answers of one run never wait into the next."""

    def judging(server: Any, sample: float) -> dict[str, Any]:
        server.control("PUT", "judging", {"sample": sample})
        if server is servers.quick:
            while server.control("GET", "status")["judge_waiting"]:
                time.sleep(0.05)
        measured: dict[str, Any] = load(server, "sku")
        return measured

    if part == "alias":
        return lambda: load(servers.quick, "sku"), lambda: load(servers.quick, "original")
    server = servers.quick if part == "judge" else servers.stuck
    return lambda: judging(server, 1.0), lambda: judging(server, 0.0)


def compare(name: str, left: Run, right: Run, pairs: int) -> dict[str, Any]:
    """Ratio of throughputs over interleaved pairs (order alternates: ABBA), by Hodges–Lehmann on the log ratios with Wilcoxon's 95 %
    interval; and of the tokens per CPU second of the server. The first pair warms up and is not counted.
    """
    found: dict[str, list[float]] = {"throughput": [], "cpu": []}
    for pair in range(pairs + 1):
        first, second = (left, right) if pair % 2 == 0 else (right, left)
        a, b = (first(), second()) if pair % 2 == 0 else (first(), second())[::-1]
        if pair:
            found["throughput"].append(math.log(a["throughput"] / b["throughput"]))
            found["cpu"].append(math.log(b["cpu_ms_per_token"] / a["cpu_ms_per_token"]))
            log(f"{name}, pair {pair}/{pairs}: {math.exp(found['throughput'][-1]):.3f}, per CPU second {math.exp(found['cpu'][-1]):.3f}")
    ratio, low, high = interval(found["throughput"])
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "pairs": pairs,
        "goal": 0.98,
        "met": low >= 0.98,
        "per_cpu_second": interval(found["cpu"]),
        "each": [round(math.exp(value), 4) for value in found["throughput"]],
    }


def interval(logs: list[float]) -> tuple[float, float, float]:
    """(ratio, lower, upper end of its 95 % interval) from the logarithms of the ratios of pairs, by Hodges and Lehmann's estimator."""
    low, middle, high = (math.exp(each) for each in sorted(hodges_lehmann(logs)))
    return middle, low, high


def side_by_side(servers: Servers, adapter: Path, load: Any, runs: int = 3) -> dict[str, dict[str, float]]:
    """Each way to serve: medians over interleaved runs; the swapped engine afterwards, since its server is the original's."""
    found = medians(
        {
            "original": lambda: load(servers.quick, "original"),
            "LoRA": lambda: load(servers.quick, "negated"),
            "fused": lambda: load(servers.fused, "sku"),
        },
        runs,
    )
    servers.quick.control("POST", "swap", {"adapter": str(adapter), "scale": 1.0})
    found.update(medians({"swapped": lambda: load(servers.quick, "sku")}, runs))
    servers.quick.control("POST", "restore")
    return found


def medians(ways: dict[str, Run], runs: int) -> dict[str, dict[str, float]]:
    """Medians of what each way measures, over runs that take turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, run in ways.items():
            found[name].append(run())
    return {name: {key: statistics.median(each[key] for each in values) for key in values[0]} for name, values in found.items()}
