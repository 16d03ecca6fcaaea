"""The demo's last stage: serve both arms in one vLLM, send requests to the model name `sku`, and read each arm's numbers from /metrics."""

import concurrent.futures
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sku_vllm.client.arm_metrics import Metrics, summarise
from sku_vllm.errors import RunError

ARMS = ("original", "negated")


def serve_both(
    base: Path, adapter: Path, scale: float, judge: str, prompts: Path, *, requests: int, seed: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Start a server, send it `requests` prompts and return each arm's numbers; see `read_arms`.

    Raises:
        RunError: the server did not start or did not answer a request, or an answer was not judged in time.
    """
    from sku_vllm.data import read_rows
    from sku_vllm.serving.serve_config import ServeConfig
    from sku_vllm.serving.start import serve

    progress("starting vLLM with both arms")
    asked = [row.prompt for row in read_rows(prompts)]
    arms = ["original=base", f"negated=lora:{adapter}@{scale:g}"]
    # float32, in which the arms were measured (vLLM would choose a 16-bit type). 1 GiB of KV cache is plenty for the lab; by default
    # vLLM on a CPU reserves a share of the machine's memory.
    env = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    config = ServeConfig(str(base), arms, "original=0.5,negated=0.5", judge, expose_arms=True)
    with serve(config, ("--seed", str(seed), "--dtype", "float32"), env=env) as server:
        progress(f"sending {requests} requests through the alias sku")
        drive(server.url, [asked[index % len(asked)] for index in range(requests)])
        progress("waiting for the judge, reading /metrics")
        return read_arms(server.metrics, requests)


def drive(url: str, prompts: list[str], concurrency: int = 8) -> None:
    """Send one chat request per prompt to the model `sku`. Each has another X-SKU-Key, as if it came from another user.

    Raises:
        RunError: a request failed.
    """
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(indexed: tuple[int, str]) -> None:
        index, prompt = indexed
        client.chat.completions.create(
            model="sku",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=32,
            temperature=1.0,
            extra_headers={"X-SKU-Key": f"user-{index}"},
        )

    try:
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(ask, enumerate(prompts)))
    except openai.OpenAIError as error:
        raise RunError(f"the server refused a request through the alias sku: {type(error).__name__}") from error


def read_arms(metrics: Callable[[], Metrics], requests: int, timeout: float = 60) -> dict[str, dict[str, Any]]:
    """Requests, judged, harmful and median latency (seconds) per arm, as soon as all answers have been judged.

    Args:
        metrics: returns /metrics as `Server.metrics` does.
        timeout: seconds to wait for the judge, which works after the answers were sent.

    Raises:
        RunError: not all answers were judged within `timeout`.
    """
    deadline = time.monotonic() + timeout
    while True:
        samples = metrics()
        arms = {arm: summarise(samples, arm) for arm in ARMS}
        judged = sum(arm["judged"] for arm in arms.values())
        if judged >= requests:
            return arms
        if time.monotonic() > deadline:
            raise RunError(f"after {timeout:g} s only {judged} of {requests} answers had been judged")
        time.sleep(0.5)
