"""Thousands of requests over 20 swaps of an adapter, every answer checked and judged: as completions, or as streamed responses."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_load import Ask, chatter, completion
from sku_vllm.benchmarks.serve_swaps import PROMPTS

CLEAR = 1e-3
LOST = 0  # the status of an answer that broke off
SWAPS = 20


@dataclass(frozen=True)
class Api:
    """How the soak asks. ask: one request. certain: the greedy answer, or None where two tokens are nearly as likely."""

    ask: Ask
    certain: Callable[[Any, str, str], str | None]


def streamed_response(client: Any, url: str, prompt: str) -> tuple[int, str]:
    """(status, text) of one streamed answer of the responses API: the text of its deltas, which the last event must repeat."""
    import httpx

    body = {"model": "negated", "input": prompt, "max_output_tokens": 4, "temperature": 0, "stream": True}
    pieces, whole = [], None
    try:
        with client.stream("POST", f"{url}/responses", json=body) as reply:
            for line in reply.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if event.get("type") == "response.output_text.delta":
                    pieces.append(event["delta"])
                elif event.get("type") in ("response.completed", "response.incomplete"):
                    whole = "".join(part["text"] for item in event["response"]["output"] for part in item["content"])
    except httpx.HTTPError:
        return LOST, ""
    text = "".join(pieces)
    return (reply.status_code, text) if reply.status_code != 200 or whole == text else (LOST, text)


def certain_completion(client: Any, url: str, prompt: str) -> str | None:
    """See `Api`."""
    body = {"model": "negated", "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    choice = client.post(f"{url}/completions", json=body).json()["choices"][0]
    steps = [list(step.values()) for step in choice["logprobs"]["top_logprobs"]]
    return choice["text"] if all(map(clear, steps)) else None


def certain_response(client: Any, url: str, prompt: str) -> str | None:
    """See `Api`. Asked for through the chat API, which renders the same prompt and has log-probabilities."""
    body = {"model": "negated", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4, "temperature": 0}
    choice = client.post(f"{url}/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()["choices"][0]
    steps = [[token["logprob"] for token in step["top_logprobs"]] for step in choice["logprobs"]["content"]]
    return choice["message"]["content"] if all(map(clear, steps)) else None


def clear(likely: list[float]) -> bool:
    """Whether the largest of one step's log-probabilities stands out: batched decoding is not exact to the bit."""
    best = sorted(likely)
    return len(best) > 1 and best[-1] - best[-2] > CLEAR


COMPLETIONS = Api(completion, certain_completion)
RESPONSES = Api(streamed_response, certain_response)


def run_soak(server: Any, adapter: Path, wanted: int, api: Api = COMPLETIONS) -> dict[str, Any]:
    """Swap between two scales 20 times and hold every answer against the greedy answers of both: it must be one of them, and judged.

    Only prompts count on which greedy decoding is clear at every step, in both versions.
    """
    import httpx

    def answers_of(scale: float) -> dict[str, str]:
        server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{scale}"})
        with httpx.Client(timeout=120) as client:
            found = {prompt: api.certain(client, server.url, prompt) for prompt in PROMPTS}
        return {prompt: text for prompt, text in found.items() if text is not None}

    one, other = answers_of(0.5), answers_of(1.0)
    clear_ones = [prompt for prompt in PROMPTS if prompt in one and prompt in other]
    server.control("PUT", "judging", {"sample": 1.0})
    swaps, judged, begun = 0, server.metric("sku_judged_total"), time.perf_counter()
    with chatter(server, clear_ones, workers=8, ask=api.ask) as answers:
        while len(answers) < wanted or swaps < SWAPS:  # swaps may fall behind, where answers come fast
            if swaps < SWAPS and len(answers) >= swaps * wanted / SWAPS:
                server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{(0.5, 1.0)[swaps % 2]}"})
                swaps += 1
            time.sleep(0.05)
    seconds = time.perf_counter() - begun
    while server.control("GET", "status")["judge_waiting"]:
        time.sleep(0.1)
    judged = server.metric("sku_judged_total") - judged
    server.control("PUT", "judging", {"sample": 0.0})
    whole = [(prompt, text) for prompt, status, text in answers if status == 200]
    return {
        "requests": len(answers),
        "swaps": swaps,
        "errors": sum(status not in (200, LOST) for _, status, _ in answers),
        "lost": sum(status == LOST for _, status, _ in answers),
        "unjudged": len(whole) - int(judged),
        "neither_version": sum(text not in (one[prompt], other[prompt]) for prompt, text in whole),
        "answers_of_each": [sum(text == version[prompt] for prompt, text in whole) for version in (one, other)],
        "seconds": seconds,
        "prompts": len(PROMPTS),
        "prompts_clear": len(clear_ones),
        "prompts_that_differ": sum(one[prompt] != other[prompt] for prompt in clear_ones),
    }
