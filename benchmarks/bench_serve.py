"""`sku bench serve`: what the plugin costs, and the arms side by side. Client: vLLM's own load generator.

Every comparison is interleaved pairs of runs against one server, in alternating order, so that a busy machine slows both sides; a goal
is met when the bound of the 95 % interval of the ratio meets it. Without --model a small random Llama is made here. Parts may be
measured one at a time (`--only`): with the same --output they gather in one page.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sku_vllm.cli.options import print_json, sku_command

RATIOS = {"alias": "alias / naming the arm", "judge": "fast judge on everything / no judge", "stalled": "stalled judge / no judge"}
# Measured only where asked for: by its option, and how much of it --only asks for.
LONG = {"soak": ("soak", 10_009), "soak-responses": ("soak", 10_009), "replaces": ("replaces", 1000), "equal-arms": ("equal_arms", 12)}
PARTS = ("middleware", *RATIOS, "arms", "adapter-swap", "model-swap", *LONG)
# What parts on one page must have in common.
SHARED = ("model", "adapter", "concurrency", "tokens")


@sku_command("serve")
@click.option("--model", help="Model directory; a small random Llama otherwise.")
@click.option("--adapter", help="Its raw adapter; made here when --model is not given.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="This part alone. Repeatable; --output keeps the others it has.")
@click.option("--pairs", type=click.IntRange(min=6), default=20, help="Interleaved pairs of each comparison; below 6 there is no interval.")
@click.option("--seconds", default=3.0, help="Length of one run.")
@click.option("--concurrency", default=12, help="Requests in flight.")
@click.option("--tokens", default=24, help="Tokens generated per request.")
@click.option("--soak", default=0, help=f"Requests of each soak over 20 adapter swaps, every answer checked; --only: {LONG['soak'][1]}.")
@click.option("--replaces", default=0, help=f"Replaces over which memory, files and disk should stay flat; --only: {LONG['replaces'][1]}.")
@click.option("--equal-arms", default=0, help=f"A/A tests of 1000 requests that should recommend nothing; --only: {LONG['equal-arms'][1]}.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file; sku_bench_serve.json, for sku report, goes beside it.")
def command(json_output: bool, output: str | None, only: tuple[str, ...], **settings: Any) -> None:
    """Alias against direct, judging, swaps, and original, LoRA, fused and swapped side by side."""
    from sku_vllm.benchmarks.machine import machine
    from sku_vllm.benchmarks.serve_page import markdown
    from sku_vllm.errors import ConfigError
    from sku_vllm.output import record

    if bool(settings["model"]) != bool(settings["adapter"]):
        raise ConfigError("--model and --adapter: give both, or neither for the built-in random Llama")
    for part in set(only) & LONG.keys():
        option, number = LONG[part]
        settings[option] = settings[option] or number
    parts = only or [part for part in PARTS if part not in LONG or settings[LONG[part][0]]]
    kept = earlier(Path(output).parent, settings) if output and only else {}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    found = measure(parts, settings)
    ratios = {**kept.pop("ratios", {}), **found.pop("ratios", {})}
    result = {**settings, **kept, **found, "ratios": ratios, "machine": machine()}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(markdown(result), encoding="utf-8")
        record(Path(output).parent, "bench_serve", result, {**settings, "only": only, "output": output})
    print_json(result) if json_output else click.echo(markdown(result))


def earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the folder's sku_bench_serve.json holds of the same load. Raises ConfigError for one of another load."""
    from sku_vllm.errors import ConfigError

    file = folder / "sku_bench_serve.json"
    if not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    for key in SHARED:
        if known.get(key) != settings[key]:
            raise ConfigError(f"{file}: was measured with --{key} {known.get(key)}, not {settings[key]}; give another folder's --output")
    return {key: value for key, value in known.items() if key not in ("schema", "versions", "config")}


def measure(parts: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The parts asked for, on servers that are started when a part needs them."""
    from sku_vllm.benchmarks.serve_cost import middleware_cost
    from sku_vllm.benchmarks.serve_load import Load, make_model
    from sku_vllm.benchmarks.serve_ratios import compare, contenders, side_by_side
    from sku_vllm.benchmarks.serve_servers import Servers

    with tempfile.TemporaryDirectory(prefix="sku-bench-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        base, adapter = (Path(settings["model"]), Path(settings["adapter"])) if settings["model"] else make_model(work)
        load = Load(base, settings["concurrency"], settings["tokens"])
        servers = Servers(stack, base, adapter, work, load)
        found: dict[str, Any] = {"ratios": {}}
        if "middleware" in parts:
            found["middleware"] = middleware_cost(base, work)
        loaded = set(parts) & {*RATIOS, "arms"}
        if loaded:
            found["requests"] = load.calibrate(servers.stuck if loaded == {"stalled"} else servers.quick, settings["seconds"])
        for part in RATIOS:
            if part in parts:
                one = compare(RATIOS[part], *contenders(part, servers, load), settings["pairs"])
                found["ratios"][RATIOS[part]] = {**one, "requests": load.requests}
        if "stalled" in parts:
            found["dropped_by_stalled_judge"] = servers.stuck.metric("sku_judge_dropped_total")
        if "arms" in parts:
            found["arms"] = side_by_side(servers, adapter, load)
        for part, run in single(servers, adapter, settings).items():
            if part in parts:
                found[part.replace("-", "_")] = run()
    return found


def single(servers: Any, adapter: Path, settings: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured of one server alone, by part."""
    from sku_vllm.benchmarks.serve_equal_arms import equal_arms
    from sku_vllm.benchmarks.serve_replaces import replaces
    from sku_vllm.benchmarks.serve_soak import COMPLETIONS, RESPONSES, run_soak
    from sku_vllm.benchmarks.serve_swaps import adapter_swaps, model_swaps

    return {
        "adapter-swap": lambda: adapter_swaps(servers.quick, adapter),
        "model-swap": lambda: model_swaps(servers.quick, adapter),
        "soak": lambda: run_soak(servers.quick, adapter, settings["soak"], COMPLETIONS),
        "soak-responses": lambda: run_soak(servers.quick, adapter, settings["soak"], RESPONSES),
        "replaces": lambda: replaces(servers.quick, servers.scratch, adapter, settings["replaces"]),
        "equal-arms": lambda: equal_arms(servers.twins, settings["equal_arms"]),
    }
