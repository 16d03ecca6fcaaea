"""`sku bench dry-run`: what `sku train --dry-run` says beforehand, against what the run then measures.

Random models of about 100M parameters with a 32k vocabulary (bench_train.py), so that memory is weights, gradients and states rather than
imports; and the lab's models, whose refusals are shorter than the answers that stand in for them. Estimate and run have a process of their
own each, one thread, and CPU time for a clock, since other work shares a machine's cores. Runs write checkpoints on the way.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from sku_vllm.benchmarks.bench_train import make_model, make_rows
from sku_vllm.benchmarks.machine import machine
from sku_vllm.cli.options import log, print_json, sku_command

TWO = {"method": "sku-contrastive-two", "steps": 16, "samples": 64, "sample_tokens": 24, "batch_size": 4}
MIRRORED = {"method": "sku-mirrored", "rounds": 2, "steps": 6}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model, settings)
    "llama, sku-mirrored, 2 rounds": ("llama", MIRRORED),
    "llama, the same, gradient checkpointing": ("llama", {**MIRRORED, "gradient_checkpointing": True}),
    "llama, the same, 512 tokens a pass": ("llama", {**MIRRORED, "tokens_per_pass": 512}),
    "llama, the same, bfloat16": ("llama", {**MIRRORED, "dtype": "bfloat16"}),
    "llama, sku-contrastive-two": ("llama", TWO),
    "llama, sku-contrastive": ("llama", {**TWO, "method": "sku-contrastive"}),
    "opt, sku-mirrored, 2 rounds": ("opt", MIRRORED),
    "opt, sku-contrastive-two": ("opt", TWO),
    "opt, task-vector --full": ("opt", {"method": "task-vector", "full": True, "steps": 12}),
    "opt, sku --full (a frozen copy)": ("opt", {"method": "sku", "full": True, "steps": 12, "batch_size": 2}),
    "lab llama, sku-contrastive-two": ("lab/llama", {"method": "sku-contrastive-two"}),
    "lab opt, sku-contrastive-two": ("lab/opt", {"method": "sku-contrastive-two"}),
}


@sku_command("dry-run")
@click.option("--shapes", help="Numbers of the shapes, from 1, separated by commas; default all.")
@click.option("--layers", default=6, help="Layers of width 768 (6: 91M parameters as a Llama, 67M as an OPT, with the embeddings).")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(shapes: str | None, layers: int, output: str | None, json_output: bool) -> None:
    """Estimated and measured memory and time, shape by shape."""
    names = [list(SHAPES)[int(number) - 1] for number in shapes.split(",")] if shapes else list(SHAPES)
    results: dict[str, Any] = {"machine": machine(), "shapes": {}}
    with tempfile.TemporaryDirectory() as work:
        make_models(Path(work), layers)
        for name in names:
            results["shapes"][name] = compare(name, Path(work))
            log(f"{name}: {results['shapes'][name]}")
    if output:
        Path(output).write_text(markdown(results), encoding="utf-8")
    print_json(results) if json_output else log(markdown(results))


def make_models(work: Path, layers: int) -> None:
    """lab/, llama/ and opt/."""
    from sku_vllm.lab import make_lab

    make_lab(work / "lab")
    for architecture in ("llama", "opt"):
        make_model(work / architecture, architecture, layers)


def compare(name: str, work: Path) -> dict[str, Any]:
    """A shape "estimated" and "measured", and its "ratios": tokens a step, seconds, and bytes at the peak above the imports."""
    found: dict[str, Any] = {kind: _in_process(kind, name, work) for kind in ("estimated", "measured")}
    promised, true = ({**values, "bytes": values["peak_memory_bytes"] - values["imports_bytes"]} for values in found.values())
    return {**found, "ratios": {key: promised[key] / true[key] for key in ("tokens_per_step", "seconds", "bytes")}}


def _in_process(kind: str, name: str, work: Path) -> dict[str, float]:
    code = f"from sku_vllm.benchmarks.bench_dry_run import measure; measure({kind!r}, {name!r}, {str(work)!r})"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise click.ClickException(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def measure(kind: str, name: str, work: str) -> None:
    """One shape in this process, estimated or run; prints tokens a step, seconds, and peak bytes in all and of the imports."""
    import time

    time.perf_counter = time.process_time  # before anything else imports it

    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig
    from sku_vllm.train import targets, trainer
    from sku_vllm.train.dry_run import estimate_run
    from sku_vllm.train.memory import peak_resident
    from sku_vllm.train.train_request import TrainRequest

    imports = peak_resident()
    model, settings = SHAPES[name]
    if model.startswith("lab"):
        lab = Path(work) / "lab"
        sets = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    else:
        forget, retain = make_rows()
        sets = load_dataset(forget, "forget"), load_dataset(retain, "retain")
        settings = {"template": "paper", **settings}
        targets.NEEDED, targets.NEEDED_EARLY = {"latent": 0.0}, 0.0  # a random base cannot refuse
        if "contrastive" in settings["method"]:
            settings["targets"] = "latent"
    config = TrainConfig.of(**settings)
    if kind == "estimated":
        found = estimate_run(TrainRequest(Path(work) / model, *sets, "nowhere", config)).to_json()
    else:
        with tempfile.TemporaryDirectory() as output:
            request = TrainRequest(Path(work) / model, *sets, Path(output) / "adapter", config, save_seconds=15)
            report = trainer.train_adapter(request, progress=False)
        found = {**report.to_json(), "tokens_per_step": report.tokens / report.steps}
    print(json.dumps({key: found[key] for key in ("tokens_per_step", "seconds", "peak_memory_bytes")} | {"imports_bytes": imports}))


def markdown(results: dict[str, Any]) -> str:
    """A row a shape, estimated / measured."""
    lines = ["| shape | forward tokens a step | GiB at the peak | ratio above imports | CPU seconds | ratio |", "|---|---|---|---|---|---|"]
    for name, found in results["shapes"].items():
        (tokens, seconds, peak), (tokens_, seconds_, peak_) = (
            [found[kind][key] for key in ("tokens_per_step", "seconds", "peak_memory_bytes")] for kind in ("estimated", "measured")
        )
        ratio = found["ratios"]
        memory = f"{peak / 2**30:.2f} / {peak_ / 2**30:.2f} | {ratio['bytes']:.2f}"
        lines.append(f"| {name} | {tokens:.0f} / {tokens_:.0f} | {memory} | {seconds:.0f} / {seconds_:.0f} | {ratio['seconds']:.2f} |")
    return "\n".join(lines) + "\n"
