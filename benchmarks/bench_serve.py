"""`sku bench serve`: what the plugin costs, and the arms side by side. Client: vLLM's own load generator.

Every comparison is interleaved pairs of runs against servers that are all up, so that a busy machine slows both sides; a goal is
met when the bound of the 95 % interval of the ratio meets it. Without --model a small random Llama is made here.
"""

import asyncio
import concurrent.futures
import contextlib
import datetime
import http.server
import io
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching")
# Two-sided 95 % quantile of Student's t by degrees of freedom (pairs − 1).
STUDENT = {4: 2.776, 9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093}


@sku_command("serve")
@click.option("--model", help="Model directory; a small random Llama otherwise.")
@click.option("--adapter", help="Its raw adapter; made here when --model is not given.")
@click.option("--pairs", type=click.Choice(["5", "10", "12", "15", "20"]), default="10", help="Interleaved pairs of each comparison.")
@click.option("--requests", default=48, help="Requests of one run.")
@click.option("--concurrency", default=12, help="Requests in flight.")
@click.option("--tokens", default=24, help="Tokens generated per request.")
@click.option("--soak", default=0, help="Requests of the soak over 20 adapter swaps that checks every answer (10000 is the goal's).")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(
    model: str | None,
    adapter: str | None,
    pairs: str,
    requests: int,
    concurrency: int,
    tokens: int,
    soak: int,
    output: str | None,
    json_output: bool,
) -> None:
    """Alias against direct, judging, swaps, and original, LoRA, fused and swapped side by side."""
    from sku_vllm.errors import ConfigError

    if bool(model) != bool(adapter):
        raise ConfigError("--model and --adapter: give both, or neither for the built-in random Llama")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="sku-bench-") as work:
        base, edit = (Path(model), Path(adapter)) if model and adapter else make_model(Path(work))
        load = Load(base, requests, concurrency, tokens)
        result = {"machine": machine(), "pairs": int(pairs), "requests": requests, "concurrency": concurrency, "tokens": tokens,
                  "middleware": middleware_cost(base, Path(work)), **measure(base, edit, Path(work), load, int(pairs), soak)}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(markdown(result), encoding="utf-8")
    print_json(result) if json_output else click.echo(markdown(result))


def make_model(work: Path) -> tuple[Path, Path]:
    """A random Llama of 6M parameters with a word-level tokenizer, and a rank-16 adapter on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(2044))]
    rules = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).float()
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    llama.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    adapted = get_peft_model(llama, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    adapted.save_pretrained(work / "adapter")
    return work / "base", work / "adapter"


class Load:
    """vLLM's load generator with one fixed shape of load."""

    def __init__(self, tokenizer: Path, requests: int, concurrency: int, tokens: int) -> None:
        self.tokenizer, self.requests, self.concurrency, self.tokens = tokenizer, requests, concurrency, tokens
        self.seed = 0

    def __call__(self, server: Any, model: str) -> dict[str, Any]:
        """Tokens/s and latencies of one run; a new seed each time, so nothing is served from a cache."""
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.seed += 1
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        args = parser.parse_args(
            [
                "--backend",
                "openai",
                "--base-url",
                server.root,
                "--endpoint",
                "/v1/completions",
                "--model",
                model,
                "--tokenizer",
                str(self.tokenizer),
                "--dataset-name",
                "random",
                "--random-input-len",
                "32",
                "--random-output-len",
                str(self.tokens),
                "--ignore-eos",
                "--disable-tqdm",
                "--num-prompts",
                str(self.requests),
                "--max-concurrency",
                str(self.concurrency),
                "--seed",
                str(self.seed),
                "--ready-check-timeout-sec",
                "0",
            ]
        )
        with contextlib.redirect_stdout(io.StringIO()):
            found = asyncio.run(main_async(args))
        if found["completed"] != self.requests:
            raise click.ClickException(f"{self.requests - found['completed']} of {self.requests} requests failed on {model}")
        return {"throughput": found["output_throughput"], "ttft_ms": found["median_ttft_ms"], "itl_ms": found["median_itl_ms"]}


def measure(base: Path, adapter: Path, work: Path, load: Load, pairs: int, soak: int) -> dict[str, Any]:
    """All comparisons on servers that run side by side."""
    from sku_vllm.fuse import fuse_checkpoint
    from sku_vllm.serving.server import start_server

    arms = ["original=base", f"negated=lora:{adapter}@1"]
    lexicon = work / "lexicon.json"
    lexicon.write_text(json.dumps({"harmful": [f"w{number}" for number in range(0, 2000, 9)]}))
    fuse_checkpoint(base, [(adapter, 1.0)], work / "fused")
    with contextlib.ExitStack() as stack:
        stalled = stack.enter_context(stalled_judge())

        def up(name: str, model: Path, arms: Sequence[str], **settings: Any) -> Any:
            log(f"starting {name}")
            start = time.perf_counter()
            server = stack.enter_context(
                start_server(model, arms, f"{arms[0].split('=')[0]}=1", flags=FLAGS, expose_arms=True, token="benchmark-token", **settings)
            )
            server.seconds = time.perf_counter() - start
            load(server, "sku")  # warm
            return server

        quick = up("the server with a fast judge", base, arms, judge=f"lexicon:{lexicon}", judge_sample=0.0)
        stuck = up("the server with a stalled judge", base, arms, judge=f"openai:{stalled}#m", judge_sample=0.0, judge_queue=8)
        fused = up("the server of fused weights", work / "fused", ["fused=base"])

        def judging(server: Any, sample: float) -> dict[str, Any]:
            server.control("PUT", "judging", {"sample": sample})
            return load(server, "sku")

        result: dict[str, Any] = {"ratios": {}}
        # each ratio within one server, so that nothing but the compared thing differs
        for name, left, right in (
            ("alias / naming the arm", lambda: judging(quick, 0.0), lambda: load(quick, "original")),
            ("fast judge on everything / no judge", lambda: judging(quick, 1.0), lambda: judging(quick, 0.0)),
            ("stalled judge / no judge", lambda: judging(stuck, 1.0), lambda: judging(stuck, 0.0)),
        ):
            result["ratios"][name] = compare(name, left, right, pairs)
        result["dropped_by_stalled_judge"] = stuck.metric("sku_judge_dropped_total")
        result["arms"] = side_by_side(
            {"original": lambda: load(quick, "original"), "LoRA": lambda: load(quick, "negated"), "fused": lambda: load(fused, "sku")}, 3
        )
        result["adapter_swap"] = adapter_swaps(quick, adapter)
        if soak:
            result["soak"] = run_soak(quick, adapter, soak)
        result["model_swap"] = model_swaps(quick, adapter, lambda: load(quick, "sku"), result["arms"])
    return result


def compare(name: str, left: Callable[[], dict[str, Any]], right: Callable[[], dict[str, Any]], pairs: int) -> dict[str, Any]:
    """Ratio of throughputs over interleaved pairs (order alternates), with its 95 % interval from the log ratios."""
    logs = []
    for pair in range(pairs):
        first, second = (left, right) if pair % 2 == 0 else (right, left)
        a, b = first()["throughput"], second()["throughput"]
        logs.append(math.log(a / b if pair % 2 == 0 else b / a))
        log(f"{name}, pair {pair + 1}/{pairs}: {math.exp(logs[-1]):.3f}")
    mean, half = statistics.mean(logs), STUDENT[pairs - 1] * statistics.stdev(logs) / math.sqrt(pairs)
    return {
        "ratio": math.exp(mean),
        "low": math.exp(mean - half),
        "high": math.exp(mean + half),
        "pairs": pairs,
        "goal": 0.98,
        "met": math.exp(mean - half) >= 0.98,
    }


def side_by_side(contenders: dict[str, Callable[[], dict[str, Any]]], runs: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: {key: statistics.median(each[key] for each in values) for key in values[0]} for name, values in found.items()}


@contextlib.contextmanager
def chatter(server: Any, workers: int = 4) -> Iterator[list[Any]]:
    """Requests to the arm `negated` for the length of the block; yields the list that fills with (prompt, status, text)."""
    import httpx

    answers: list[Any] = []
    stop = threading.Event()

    def talk(worker: int) -> None:
        with httpx.Client(timeout=120) as client:
            number = worker
            while not stop.is_set():
                prompt = f"w{number % 50} w{number % 50 + 60}"
                reply = client.post(
                    f"{server.url}/completions", json={"model": "negated", "prompt": prompt, "max_tokens": 4, "temperature": 0}
                )
                answers.append((prompt, reply.status_code, reply.json()["choices"][0]["text"] if reply.status_code == 200 else ""))
                number += workers

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(talk, worker) for worker in range(workers)]
        try:
            yield answers
        finally:
            stop.set()
            for each in running:
                each.result()


def adapter_swaps(server: Any, adapter: Path, wanted: int = 500) -> dict[str, Any]:
    """Replace the negated arm again and again under load until `wanted` requests were answered."""
    before = server.metrics().get("sku_swap_seconds_sum", {}).get((), 0.0)
    seconds, scale = [], 0
    with chatter(server) as answers:
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
    """Every answer over 20 swaps between two scales must be one version's greedy answer, on prompts whose answers differ."""
    import httpx

    def answers_of(scale: float) -> dict[str, str]:
        server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{scale}"})
        ask = {"model": "negated", "max_tokens": 4, "temperature": 0}
        return {prompt: httpx.post(f"{server.url}/completions", json={**ask, "prompt": prompt}, timeout=120).json()["choices"][0]["text"]
                for prompt in (f"w{number} w{number + 60}" for number in range(50))}

    known = {scale: answers_of(scale) for scale in (0.5, 1.0)}
    swaps = 0
    with chatter(server, 8) as answers:
        while len(answers) < wanted:
            if len(answers) >= swaps * wanted / 20:
                server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{(0.5, 1.0)[swaps % 2]}"})
                swaps += 1
            time.sleep(0.05)
    wrong = sum(text not in (known[0.5][prompt], known[1.0][prompt]) for prompt, status, text in answers if status == 200)
    return {"requests": len(answers), "swaps": swaps, "errors": sum(status != 200 for _, status, _ in answers), "neither_version": wrong,
            "prompts": 50, "prompts_that_differ": sum(known[0.5][prompt] != known[1.0][prompt] for prompt in known[0.5])}


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


def middleware_cost(base: Path, work: Path) -> dict[str, float]:
    """Milliseconds the middleware adds to a 2 KB chat request, in process: with and without it, request by request."""
    from sku_vllm.serving.config import ServeConfig
    from sku_vllm.serving.middleware import SkuMiddleware
    from sku_vllm.serving.begin import prepare_state
    from sku_vllm.serving.runtime import Runtime

    config = ServeConfig(str(base), ["original=base", "other=base"], run=str(work / "run"), expose_arms=True)
    runtime = Runtime(config)
    prepare_state(config, runtime.state)
    body = json.dumps({"model": "sku", "messages": [{"role": "user", "content": "word " * 380}], "max_tokens": 32}).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    routed = SkuMiddleware(app, runtime)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"x-sku-key", b"user-1")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "root_path": ""}

    async def once(target: Any) -> float:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            return None

        start = time.perf_counter()
        await target(dict(scope), receive, send)
        return (time.perf_counter() - start) * 1000

    async def run() -> tuple[list[float], list[float]]:
        without, with_it = [], []
        for _ in range(3000):
            without.append(await once(app))
            with_it.append(await once(routed))
        return without[500:], with_it[500:]

    without, with_it = asyncio.run(run())
    added = {q: quantile(with_it, q) - quantile(without, q) for q in (0.5, 0.99)}
    return {"bytes": len(body), "p50_ms": added[0.5], "p99_ms": added[0.99], "goal_p50_ms": 0.3, "goal_p99_ms": 1.0}


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[int(q * len(values))]


@contextlib.contextmanager
def stalled_judge() -> Iterator[str]:
    """An endpoint that accepts every request and never answers."""
    release = threading.Event()

    class Never(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            release.wait()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Never)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        release.set()
        server.shutdown()
        server.server_close()


def machine() -> dict[str, Any]:
    from sku_vllm.output import versions

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(result: dict[str, Any]) -> str:
    """The results as one page."""
    own = result["machine"]
    yes = {True: "met", False: "not met"}
    lines = [
        "# Serving",
        "",
        f"{own['cpu']}, {own['cores']} cores, {own['system']}; "
        + ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        + f"; {own['date']}.",
        f"{result['requests']} requests of 32 + {result['tokens']} tokens, {result['concurrency']} at once, "
        "vLLM's own load generator; GPU: not measured.",
        "",
        "| throughput | ratio | 95 % interval | goal |",
        "|---|---|---|---|",
        *(
            f"| {name} | {each['ratio']:.3f} | {each['low']:.3f} – {each['high']:.3f} ({each['pairs']} pairs) | "
            f"≥ {each['goal']}: {yes[each['met']]} |"
            for name, each in result["ratios"].items()
        ),
        "",
        "| arm | tokens/s | TTFT ms | ITL ms |",
        "|---|---|---|---|",
        *(f"| {name} | {each['throughput']:.0f} | {each['ttft_ms']:.1f} | {each['itl_ms']:.2f} |" for name, each in result["arms"].items()),
        "",
        "original and LoRA share one LoRA-enabled engine, which is slower than a plain one; fused is a plain engine. "
        "Compare latencies with that in mind.",
        "",
    ]
    cost, adapter, model = result["middleware"], result["adapter_swap"], result["model_swap"]
    lines += [
        f"- middleware, {cost['bytes']} bytes, in process: p50 +{cost['p50_ms']:.3f} ms (goal 0.3), p99 +{cost['p99_ms']:.3f} ms (goal 1)",
        f"- adapter swap under load: {adapter['mean_inside_s'] * 1000:.0f} ms from an adapter on disk to answers from it (goal 50 ms), "
        f"{adapter['median_s'] * 1000:.0f} ms for the whole call with writing the negation (median of {adapter['swaps']}), {adapter['errors']} errors in {adapter['requests']} requests",
        f"- whole-model swap: median {model['median_s']:.2f} s, of which requests wait {model['median_stalled_s'] * 1000:.0f} ms; "
        f"server start {model['start_s']:.1f} s, "
        f"{model['ratio']:.0f}x (goal 100x), {model['ratio_stalled']:.0f}x by the wait",
        f"- answers the stalled judge made us drop: {result['dropped_by_stalled_judge']:.0f}, counted",
    ]
    if "soak" in result:
        soak = result["soak"]
        lines.append(
            f"- soak: {soak['requests']} requests over {soak['swaps']} swaps, {soak['errors']} errors, "
            f"{soak['neither_version']} answers of neither version; {soak['prompts_that_differ']} of {soak['prompts']} prompts tell the versions apart"
        )
    return "\n".join(lines) + "\n"
