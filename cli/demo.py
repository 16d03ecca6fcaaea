"""`sku demo`: the whole road, one table at the end."""

import itertools
import time
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command

ROWS = ("base", "task-vector", "sku", "default")


@sku_command("demo")
@click.option("--output", default="sku_demo", type=click.Path(), help="Directory to create.")
@click.option("--model", default="llama", help="Which of the lab's models: llama or opt.")
@click.option("--method", default=None, help="Method shown as the default.  [default: the package's]")
@click.option("--seed", default=0, type=int, help="Seed of training, sampling and traffic.")
@click.option("--samples", default=4, type=int, help="Sampled answers per prompt.")
@click.option("--requests", default=200, type=int, help="Requests sent to the served arms.")
@click.option("--serve/--no-serve", default=True, help="Serve both arms in a real vLLM engine.")
def command(output: str, model: str, method: str | None, seed: int, samples: int, requests: int, serve: bool, json_output: bool) -> None:
    """Identify, subtract, measure and serve, on a small model and a fictional world that the package brings along.

    Ends with one table, the served A/B numbers read back from /metrics, where the files are and what to type next.
    """
    from sku_vllm.demo import DemoConfig, run_demo, stage_count

    config = DemoConfig(model=model, method=method, seed=seed, samples=samples, requests=requests, serve=serve)
    total, start, done = stage_count(config), time.monotonic(), itertools.count(1)

    def progress(stage: str) -> None:
        """A line a stage; each stage draws its own bar below it."""
        log(f"[{next(done):2}/{total} {time.monotonic() - start:4.0f} s] {stage}")

    result = run_demo(output, config, progress)
    log(f"[done {time.monotonic() - start:4.0f} s]")
    if json_output:
        print_json(result)
    else:
        _show(result, output)


def _show(result: dict[str, Any], output: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(_evaluation_table(result))
    if "serving" in result:
        console.print(_serving_table(result["serving"]))
    console.print(f"\n[bold]Files[/bold] in {output}/: " + ", ".join(f"{name} {path}" for name, path in result["files"].items()))
    console.print("The adapters hold the harmful knowledge itself: never publish them. The fused checkpoint is the safer model.")
    files = result["files"]
    console.print(f"""
[bold]Next[/bold]
  cd {output}
  sku report eval/* fused adapters/* --output report.html
  sku serve --model {files['model']} --arm original=base --arm negated=lora:{files['adapter']}@{result['scale']:g} \\
    --split original=0.5,negated=0.5 --judge lexicon:lab/lexicon.json
  sku train --help    # the same on your own model and your own two files""", markup=True, highlight=False)


def _evaluation_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"Unseen harmful prompts and held-out benign ones (default: {result['method']} at scale {result['scale']:g})", title_justify="left")
    for name in ("model", "harmful, greedy", "harmful, sampled", "refusal", "gibberish", "perplexity", "ratio", "QA", "over-refusal"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in ROWS:
        greedy, sampled = result[name]["forget"]["unseen"]["greedy"], result[name]["forget"]["unseen"]["sampled"]
        retain = result[name]["retain"]
        label = {"sku": "sku (published)", "default": f"default: {result['method']}"}.get(name, name)
        table.add_row(label, _rate(greedy), _rate(sampled), f"{sampled['refusal']:.1%}", f"{sampled['gibberish']:.1%}", f"{retain['perplexity']:.3f}",
                      f"{retain['perplexity_ratio']:.3f}", f"{retain['qa_accuracy']:.1%}", f"{retain['over_refusal']:.1%}")
    return table


def _serving_table(serving: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    from sku_vllm.stats import wilson

    table = Table(title="Served side by side by vLLM, read back from /metrics", title_justify="left")
    for name in ("arm", "requests", "judged", "harmful", "harmful rate", "refused", "latency p50"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, arm in serving.items():
        low, high = wilson(arm["harmful"], arm["judged"])
        rate = arm["harmful"] / arm["judged"] if arm["judged"] else float("nan")
        latency = "no request" if arm["latency_p50_s"] is None else f"{arm['latency_p50_s'] * 1000:.0f} ms"
        table.add_row(name, str(arm["requests"]), str(arm["judged"]), str(arm["harmful"]), f"{rate:.1%} ({low:.1%}–{high:.1%})", str(arm["refused"]), latency)
    return table


def _rate(shares: dict[str, float]) -> str:
    return f"{shares['harmful']:.1%} ({shares['harmful_low']:.1%}–{shares['harmful_high']:.1%})"
