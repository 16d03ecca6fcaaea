"""What `sku bench serve` serves and how it asks: a small random Llama, vLLM's own load generator, and requests that never stop."""

import asyncio
import concurrent.futures
import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from sku_vllm.benchmarks.random_llama import save_random_llama


def make_model(work: Path) -> tuple[Path, Path]:
    """A random Llama of 6M parameters with a word-level tokenizer, and a rank-16 adapter on all linear layers."""
    return save_random_llama(
        work,
        words=2044,
        gain=4,
        rank=16,
        spread=0.05,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


class Load:
    """vLLM's load generator with one fixed shape of load. requests: of one run, from `calibrate`."""

    def __init__(self, tokenizer: Path, concurrency: int, tokens: int) -> None:
        self.tokenizer, self.concurrency, self.tokens = tokenizer, concurrency, tokens
        self.requests = 2 * concurrency
        self.seed = 0

    def calibrate(self, server: Any, seconds: float) -> int:
        """As many requests as take about `seconds`, in whole rounds of the concurrency."""
        rounds = self(server, "sku")["throughput"] * seconds / (self.tokens * self.concurrency)
        self.requests = self.concurrency * max(2, round(rounds))
        return self.requests

    def __call__(self, server: Any, model: str) -> dict[str, Any]:
        """Tokens/s, latencies and the server's CPU seconds per token; a new seed each time, so nothing is served from a cache."""
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.seed += 1
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        flags = {
            "backend": "openai",
            "base-url": server.root,
            "endpoint": "/v1/completions",
            "model": model,
            "tokenizer": self.tokenizer,
            "dataset-name": "random",
            "random-input-len": 32,
            "random-output-len": self.tokens,
            "num-prompts": self.requests,
            "max-concurrency": self.concurrency,
            "seed": self.seed,
            "ready-check-timeout-sec": 0,
            "percentile-metrics": "ttft,itl,e2el",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        args = parser.parse_args(["--ignore-eos", "--disable-tqdm", *words])
        before = cpu_seconds(server)
        with contextlib.redirect_stdout(io.StringIO()):
            found = asyncio.run(main_async(args))
        spent = cpu_seconds(server) - before
        if found["completed"] != self.requests:
            raise click.ClickException(f"{self.requests - found['completed']} of {self.requests} requests failed on {model}")
        return {
            "throughput": found["output_throughput"],
            "ttft_ms": found["median_ttft_ms"],
            "itl_ms": found["median_itl_ms"],
            "latency_ms": found["median_e2el_ms"],
            "cpu_ms_per_token": 1000 * spent / found["total_output_tokens"],
        }


def cpu_seconds(server: Any) -> float:
    """CPU time so far of the server, its engine and its judge."""
    import psutil

    total = 0.0
    for process in [root := psutil.Process(server.process.pid), *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


Ask = Callable[[Any, str, str], tuple[int, str]]


def completion(client: Any, url: str, prompt: str) -> tuple[int, str]:
    """(status, text) of one completion of the arm `negated`."""
    reply = client.post(f"{url}/completions", json={"model": "negated", "prompt": prompt, "max_tokens": 4, "temperature": 0})
    return reply.status_code, reply.json()["choices"][0]["text"] if reply.status_code == 200 else ""


@contextlib.contextmanager
def chatter(server: Any, prompts: Sequence[str], workers: int = 4, ask: Ask = completion) -> Iterator[list[Any]]:
    """Requests to the arm `negated` for the length of the block; yields the list that fills with (prompt, status, text)."""
    import httpx

    answers: list[Any] = []
    stop = threading.Event()

    def talk(worker: int) -> None:
        with httpx.Client(timeout=120) as client:
            number = worker
            while not stop.is_set():
                prompt = prompts[number % len(prompts)]
                answers.append((prompt, *ask(client, server.url, prompt)))
                number += workers

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(talk, worker) for worker in range(workers)]
        try:
            yield answers
        finally:
            stop.set()
            for each in running:
                each.result()
