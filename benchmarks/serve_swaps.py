"""Swaps of a running server under load: of adapters, of adapters with every answer checked (soak), and of whole models."""

import statistics
import time
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_load import chatter

PROMPTS = [f"w{number} w{number + 60}" for number in range(50)]
CLEAR = 1e-3


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


def run_soak(server: Any, adapter: Path, wanted: int) -> dict[str, Any]:
    """Swap between two scales 20 times and hold every answer against the greedy answers of both: it must be one of them.

    Only prompts count on which greedy decoding is clear, that is, the two largest log-probabilities differ by more than 1e-3 at every
    step, since batched decoding is not exact to the bit.
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
    swaps, begun = 0, time.perf_counter()
    with chatter(server, clear, workers=8) as answers:
        while len(answers) < wanted:
            if len(answers) >= swaps * wanted / 20:
                server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{(0.5, 1.0)[swaps % 2]}"})
                swaps += 1
            time.sleep(0.05)
    wrong = sum(text not in (one[prompt], other[prompt]) for prompt, status, text in answers if status == 200)
    return {
        "requests": len(answers),
        "swaps": swaps,
        "errors": sum(status != 200 for _, status, _ in answers),
        "neither_version": wrong,
        "answers_of_each": [sum(text == version[prompt] for prompt, _, text in answers) for version in (one, other)],
        "seconds": time.perf_counter() - begun,
        "prompts": len(PROMPTS),
        "prompts_clear": len(clear),
        "prompts_that_differ": sum(one[prompt] != other[prompt] for prompt in clear),
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
