"""Swaps of a running server, of adapters under load and of whole models: how long they take."""

import statistics
import time
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_load import chatter

PROMPTS = [f"w{number} w{number + 60}" for number in range(50)]


def adapter_swaps(server: Any, adapter: Path, wanted: int = 500) -> dict[str, Any]:
    """Replace the negated arm under load, each time by a new scale, until `wanted` requests were answered and 20 swaps were made.

    median_s and max_s are seconds of the whole call, in which the server also writes the negated adapter; median_inside_s is the part
    from the adapter on disk to the first answer from it.
    """
    seconds: list[float] = []
    inside: list[float] = []
    with chatter(server, PROMPTS) as answers:
        while len(answers) < wanted or len(seconds) < 20:
            start = time.perf_counter()
            done = server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{0.01 * (len(seconds) + 1):.2f}"})
            seconds.append(time.perf_counter() - start)
            inside.append(done["seconds"])
            time.sleep(1)
    return {
        "requests": len(answers),
        "errors": sum(status != 200 for _, status, _ in answers),
        "swaps": len(seconds),
        "median_s": statistics.median(seconds),
        "max_s": max(seconds),
        "median_inside_s": statistics.median(inside),
        "goal_s": 0.05,
    }


def model_swaps(server: Any, adapter: Path, turns: int = 10) -> dict[str, Any]:
    """Whole-model swaps, each verified and restored, against the same server's start."""
    swaps, restores = [], []
    for _ in range(turns):
        swaps.append(server.control("POST", "swap", {"adapter": str(adapter), "scale": 1.0}))
        restores.append(server.control("POST", "restore"))
    whole, wait, back = (
        statistics.median(each)
        for each in (
            [done["seconds"] for done in swaps],
            [done["stalled_seconds"] for done in swaps],
            [done["seconds"] for done in restores],
        )
    )
    return {
        "swaps": turns,
        "median_s": whole,
        "max_s": max(done["seconds"] for done in swaps),
        "median_stalled_s": wait,
        "median_restore_s": back,
        "start_s": server.seconds,
        "ratio": server.seconds / whole,
        "ratio_stalled": server.seconds / wait,
        "goal": 100,
        "exact_restores": sum(done["probe"]["from_base"] == 0.0 for done in restores),
    }
