"""`sku demo`: run all steps on the built-in lab and print a table of the results."""

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

    \b
    sku demo --model opt --no-serve
    """
    from sku_vllm.demo.demo import DemoConfig, run_demo, stage_count

    config = DemoConfig(model=model, method=method, seed=seed, samples=samples, requests=requests, serve=serve)
    total, start, done = stage_count(config), time.monotonic(), itertools.count(1)

    def progress(stage: str) -> None:
        """Print one line per stage; a stage may draw a progress bar below it."""
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
    files = result["files"]
    # click.echo instead of rich, which would wrap the commands, so that they could not be copied.
    click.echo(f"Files in {output}/: {', '.join(files.values())}")
    click.echo("The adapters are the harmful knowledge itself: never publish them. The fused checkpoint is the safer model.")
    click.echo(f"""
What to type next:
  cd {output}
  sku report eval/* fused adapters/* --serving-dtype float32 --output report.html
  sku serve --model {files["model"]} --arm original=base --arm negated=lora:{files["adapter"]}@{result["scale"]:g} \\
    --dtype float32 --split original=0.5,negated=0.5 --judge lexicon:lab/lexicon.json
  sku train --help    # the same on your own model and your own two files""")


def _evaluation_table(result: dict[str, Any]) -> Any:
    title = "Harmful answers to unseen prompts and what it cost; %, with 95 % intervals"
    table = _table(title, "model", "harmful\ngreedy", "harmful\nsampled", "re-\nfused", "gib-\nberish", "said\nagain", "ppl", "QA")
    for name in ROWS:
        greedy, sampled = result[name]["forget"]["unseen"]["greedy"], result[name]["forget"]["unseen"]["sampled"]
        retain = result[name]["retain"]
        label = {"sku": "SKU (paper)", "default": f"default {result['scale']:g}"}.get(name, name)
        table.add_row(
            label,
            _rate(greedy),
            _rate(sampled),
            _percent(sampled["refusal"]),
            _percent(sampled["gibberish"]),
            _percent(sampled["repeated"]),
            f"x{retain['perplexity_ratio']:.3f}",
            _percent(retain["qa_accuracy"]),
        )
    chosen = "chosen on validation data" if result["qualifies"] else "taken because NONE met the limits on validation data"
    table.caption = f"default: {result['method']}, the scale {chosen}; measured on the fused checkpoint"
    return table


def _serving_table(serving: dict[str, dict[str, Any]]) -> Any:
    from sku_vllm.stats import wilson

    table = _table(
        "Served side by side by vLLM, read back from /metrics",
        "arm",
        "requests",
        "judged",
        "harmful",
        "harmful %",
        "refused",
        "latency p50",
    )
    for name, arm in serving.items():
        low, high = wilson(arm["harmful"], arm["judged"])
        rate = (
            _rate({"harmful": arm["harmful"] / arm["judged"], "harmful_low": low, "harmful_high": high})
            if arm["judged"]
            else "nothing judged"
        )
        latency = "no request" if arm["latency_p50_s"] is None else f"{arm['latency_p50_s'] * 1000:.0f} ms"
        table.add_row(name, str(arm["requests"]), str(arm["judged"]), str(arm["harmful"]), rate, str(arm["refused"]), latency)
    return table


def _table(title: str, *columns: str) -> Any:
    """A table that fits into 80 columns. The first column is left-aligned text, the others are right-aligned numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rate(shares: dict[str, float]) -> str:
    return f"{_percent(shares['harmful'])} ({100 * shares['harmful_low']:.0f}–{100 * shares['harmful_high']:.0f})"
