"""Swaps of a running server under load: adapters, the soak that checks every answer, and whole models."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_load import chatter, side_by_side

PROMPTS = [f"w{number} w{number + 60}" for number in range(50)]
CLEAR = 1e-3


def adapter_swaps(server: Any, adapter: Path, wanted: int = 500) -> dict[str, Any]:
    """Replace the negated arm again and again under load until `wanted` requests were answered."""
    before = server.metrics().get("sku_swap_seconds_sum", {}).get((), 0.0)
    seconds, scale = [], 0
    with chatter(server, PROMPTS) as answers:
        while len(answers) < wanted:
            scale = scale % 9 + 1
            start = time.perf_counter()
            server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{scale / 10}"})
            seconds.append(time.perf_counter() - start)
            time.sleep(1)
    spent = server.metrics()["sku_swap_seconds_sum"][()] - before
    return {"requests": len(answers), "errors": sum(status != 200 for _, status, _ in answers), "swaps": len(seconds),
            "median_s": statistics.median(seconds), "max_s": max(seconds), "mean_inside_s": spent / len(seconds), "goal_s": 0.05}


def run_soak(server: Any, adapter: Path, wanted: int) -> dict[str, Any]:
    """Every answer over 20 swaps between two scales must be one version's greedy answer, on prompts where greedy is clear: the top two
    log-probabilities more than 1e-3 apart at every step, since batched decoding is not exact to the bit.
    """
    import httpx

    def answers_of(scale: float) -> dict[str, str]:
        server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{scale}"})
        ask = {"model": "negated", "max_tokens": 4, "temperature": 0, "logprobs": 2}
        found = {}
        for prompt in PROMPTS:
            choice = httpx.post(f"{server.url}/completions", json={**ask, "prompt": prompt}, timeout=120).json()["choices"][0]
            best = [sorted(step.values()) for step in choice["logprobs"]["top_logprobs"]]
            if all(len(step) > 1 and step[-1] - step[-2] > CLEAR for step in best):
                found[prompt] = choice["text"]
        return found

    one, other = answers_of(0.5), answers_of(1.0)
    clear = [prompt for prompt in PROMPTS if prompt in one and prompt in other]
    swaps = 0
    with chatter(server, clear, workers=8) as answers:
        while len(answers) < wanted:
            if len(answers) >= swaps * wanted / 20:
                server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{(0.5, 1.0)[swaps % 2]}"})
                swaps += 1
            time.sleep(0.05)
    wrong = sum(text not in (one[prompt], other[prompt]) for prompt, status, text in answers if status == 200)
    return {"requests": len(answers), "swaps": swaps, "errors": sum(status != 200 for _, status, _ in answers), "neither_version": wrong,
            "prompts": len(PROMPTS), "prompts_clear": len(clear),
            "prompts_that_differ": sum(one[prompt] != other[prompt] for prompt in clear)}


def model_swaps(server: Any, adapter: Path, run: Callable[[], dict[str, Any]], arms: dict[str, Any]) -> dict[str, Any]:
    """Whole-model swaps against the same server's start; the swapped engine's throughput joins `arms`."""
    seconds, stalled = [], []
    for turn in range(5):
        done = server.control("POST", "swap", {"adapter": str(adapter), "scale": 1.0})
        seconds.append(done["seconds"])
        stalled.append(done["stalled_seconds"])
        if turn == 4:
            arms.update(side_by_side({"swapped": run}, 3))
        server.control("POST", "restore")
    start = server.seconds
    return {"median_s": statistics.median(seconds), "median_stalled_s": statistics.median(stalled), "start_s": start,
            "ratio": start / statistics.median(seconds), "ratio_stalled": start / statistics.median(stalled), "goal": 100}
