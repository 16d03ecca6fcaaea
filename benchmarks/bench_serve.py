"""`sku bench serve`: what the plugin costs, and the arms side by side. Client: vLLM's own load generator.

Every comparison is interleaved pairs of runs against one server, so that a busy machine slows both sides; a goal is met when
the bound of the 95 % interval of the ratio meets it. Without --model a small random Llama is made here.
"""

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching")
# Two-sided 95 % quantile of Student's t by degrees of freedom (pairs − 1).
STUDENT = {1: 12.706, 4: 2.776, 9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093}


@sku_command("serve")
@click.option("--model", help="Model directory; a small random Llama otherwise.")
@click.option("--adapter", help="Its raw adapter; made here when --model is not given.")
@click.option("--pairs", type=click.Choice(["2", "5", "10", "12", "15", "20"]), default="10", help="Interleaved pairs of each comparison.")
@click.option("--seconds", default=4.0, help="Length of one run.")
@click.option("--concurrency", default=12, help="Requests in flight.")
@click.option("--tokens", default=24, help="Tokens generated per request.")
@click.option("--soak", default=0, help="Requests of the soak over 20 adapter swaps that checks every answer (10000 is the goal's).")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file; sku_bench_serve.json, for sku report, goes beside it.")
def command(json_output: bool, output: str | None, **settings: Any) -> None:
    """Alias against direct, judging, swaps, and original, LoRA, fused and swapped side by side."""
    from sku_vllm.benchmarks.machine import machine
    from sku_vllm.benchmarks.serve_cost import middleware_cost
    from sku_vllm.benchmarks.serve_load import Load, make_model
    from sku_vllm.benchmarks.serve_page import markdown
    from sku_vllm.errors import ConfigError
    from sku_vllm.output import record

    model, adapter = settings["model"], settings["adapter"]
    if bool(model) != bool(adapter):
        raise ConfigError("--model and --adapter: give both, or neither for the built-in random Llama")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="sku-bench-") as work:
        base, edit = (Path(model), Path(adapter)) if model and adapter else make_model(Path(work))
        load = Load(base, settings["concurrency"], settings["tokens"])
        cost = middleware_cost(base, Path(work))
        found = measure(base, edit, Path(work), load, int(settings["pairs"]), settings["seconds"], settings["soak"])
    result = {"machine": machine(), **settings, "requests": load.requests, "middleware": cost, **found}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(markdown(result), encoding="utf-8")
        record(Path(output).parent, "bench_serve", result, {**settings, "output": output})
    print_json(result) if json_output else click.echo(markdown(result))


def measure(base: Path, adapter: Path, work: Path, load: Any, pairs: int, seconds: float, soak: int) -> dict[str, Any]:
    """All comparisons on servers that run side by side."""
    from sku_vllm.benchmarks.serve_cost import stalled_judge
    from sku_vllm.benchmarks.serve_load import side_by_side
    from sku_vllm.benchmarks.serve_swaps import adapter_swaps, model_swaps, run_soak
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
        load.calibrate(quick, seconds)

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
    """Ratio of throughputs over interleaved pairs (order alternates), with its 95 % interval from the log ratios; and of the tokens
    per CPU second of the server, which other programs on the machine disturb less.
    """
    found: dict[str, list[float]] = {"throughput": [], "cpu": []}
    for pair in range(pairs):
        first, second = (left, right) if pair % 2 == 0 else (right, left)
        a, b = (first(), second()) if pair % 2 == 0 else (first(), second())[::-1]
        found["throughput"].append(math.log(a["throughput"] / b["throughput"]))
        found["cpu"].append(math.log(b["cpu_ms_per_token"] / a["cpu_ms_per_token"]))
        log(f"{name}, pair {pair + 1}/{pairs}: {math.exp(found['throughput'][-1]):.3f}, per CPU second {math.exp(found['cpu'][-1]):.3f}")
    ratio, low, high = interval(found["throughput"])
    cpu = interval(found["cpu"])
    return {"ratio": ratio, "low": low, "high": high, "pairs": pairs, "goal": 0.98, "met": low >= 0.98, "per_cpu_second": cpu}


def interval(logs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval (Student's t)."""
    mean, half = statistics.mean(logs), STUDENT[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
