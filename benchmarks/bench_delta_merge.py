"""`sku bench kernel`: the delta merge against torch's `addmm_` loop and PEFT's own merge, as a share of this machine's copy bandwidth.

A merge reads and writes every weight once, so copying the weights on the device is the bound, and it is measured first. On a GPU
the Triton kernel runs in one grouped launch over the layers given; without one the CPU path is measured and the result says so.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.cli.options import print_json, sku_command

if TYPE_CHECKING:
    import torch

    Factors = tuple[torch.Tensor, torch.Tensor]

# [out, in] of one decoder layer's linear weights, and how many layers there are.
MODELS = {
    "opt-2.7b": ([(2560, 2560)] * 4 + [(10240, 2560), (2560, 10240)], 32),
    "llama2-7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
    "llama2-13b": ([(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)], 40),
}


@sku_command("kernel")
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS), help="Shapes to merge; may be repeated."
)
@click.option("--rank", "ranks", multiple=True, type=int, default=[8, 32, 128], help="LoRA ranks; may be repeated.")
@click.option("--layers", type=int, help="Layers of each model; 1 on a CPU and all on a GPU unless given.")
@click.option("--runs", default=5, help="Interleaved runs of each contender.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(models: tuple[str, ...], ranks: tuple[int, ...], layers: int | None, runs: int, output: str | None, json_output: bool) -> None:
    """Delta merge in GB/s and as a share of the measured copy bandwidth."""
    results = measure(list(models), list(ranks), layers, runs)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(markdown(results), encoding="utf-8")
    if json_output:
        print_json(results)
    else:
        click.echo(markdown(results))


def measure(models: list[str], ranks: list[int], layers: int | None, runs: int) -> dict[str, Any]:
    """{"device", "machine", "rows": [{"model", "rank", "layers", "gb", "copy", "delta_merge", "addmm_", "peft"}]}; seconds are medians."""
    import torch

    from sku_vllm.benchmarks.machine import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for model in models:
        shapes, depth = MODELS[model]
        count = layers or (depth if device == "cuda" else 1)
        weights = [(torch.randn(shape, device=device) * 0.02).bfloat16() for shape in shapes * count]
        spare = [torch.empty_like(weight) for weight in weights]
        for rank in ranks:
            factors = [_factors(weight.shape, rank, device) for weight in weights]
            found: dict[str, list[float]] = {}
            for _ in range(runs + 1):  # the first one compiles and warms
                for name, action in contenders(weights, spare, factors, rank).items():
                    found.setdefault(name, []).append(timed(action, device))
            gigabytes = 2 * sum(weight.nbytes for weight in weights) / 1e9
            medians = {name: statistics.median(values[1:]) for name, values in found.items()}
            rows.append({"model": model, "rank": rank, "layers": count, "gb": gigabytes, **medians})
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (no GPU here: the Triton kernel is not measured)"
    return {"device": name, "machine": machine(), "threads": torch.get_num_threads(), "rows": rows}


def _factors(shape: Sequence[int], rank: int, device: str) -> "Factors":
    import torch

    return (torch.randn(shape[0], rank, device=device) * 1e-3).bfloat16(), (torch.randn(rank, shape[1], device=device) * 1e-2).bfloat16()


def contenders(
    weights: list["torch.Tensor"], spare: list["torch.Tensor"], factors: list["Factors"], rank: int
) -> dict[str, Callable[[], object]]:
    """Copy, kernel, the loop anyone would write, and PEFT's arithmetic (product, scaling and sum each rounded to bf16)."""
    from sku_vllm.kernels.delta_merge import Merge, Summand, delta_merge

    def copy() -> None:
        for source, target in zip(weights, spare, strict=True):
            target.copy_(source)

    def kernel() -> None:
        delta_merge([Merge(weight, [Summand(b, a, 0.5)], out=out) for weight, out, (b, a) in zip(weights, spare, factors, strict=True)])

    def addmm() -> None:
        for weight, (b, a) in zip(spare, factors, strict=True):
            weight.addmm_(b, a, alpha=-0.5)

    def peft() -> None:
        for weight, (b, a) in zip(spare, factors, strict=True):
            left, right = (b.float(), a.float()) if weight.device.type == "cpu" else (b, a)
            weight.sub_(((left @ right) * 0.5).to(weight.dtype))

    return {"copy": copy, "delta_merge": kernel, "addmm_": addmm, "peft": peft}


def timed(action: Callable[[], object], device: str) -> float:
    """Seconds that a call takes, the GPU's work included."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def markdown(results: dict[str, Any]) -> str:
    """A row a model and rank: bandwidths, and ratios to addmm_ and PEFT."""
    about = results["machine"]
    lines = [
        "# bench kernel",
        "",
        f"{about['date']}, {results['device']}, {results['threads']} threads ({about['cpu']}), load {about['load']} at the end, "
        f"torch {about['versions']['torch']}, triton {about['versions'].get('triton', '-')}. bf16 weights and factors, "
        "medians of interleaved runs. delta_merge also measures retained and noise; addmm_ and PEFT's arithmetic do not.",
        "",
        "| model | layers | rank | copy GB/s | delta_merge GB/s | share of copy | × addmm_ | × PEFT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        copy, merge = row["gb"] / row["copy"], row["gb"] / row["delta_merge"]
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['rank']} | {copy:.1f} | {merge:.1f} | {merge / copy:.0%} "
            f"| {row['addmm_'] / row['delta_merge']:.2f} | {row['peft'] / row['delta_merge']:.2f} |"
        )
    return "\n".join(lines) + "\n"
