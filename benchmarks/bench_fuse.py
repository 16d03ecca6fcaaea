"""`sku bench fuse`: what fusing costs beside copying, PEFT and mergekit, on a checkpoint of 1.1B bf16 parameters made here.

Every contender reads the same base (page cache warm) and leaves synced files. Runs are interleaved and the median counts, so that
a busy machine slows all alike. In-process time is what the library call takes; the CLI's wall time includes Python's imports.

Each run begins right after a copy was made and removed, whose memory is then at hand: cp at its best. A virtual machine that
reports free memory to its host loses it within seconds, and copies pay for every page they get back: that is what --settle shows.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from sku_vllm.benchmarks.fuse_inputs import SIZES, make_adapter, make_base
from sku_vllm.benchmarks.fuse_page import markdown, memory_markdown
from sku_vllm.benchmarks.machine import machine
from sku_vllm.cli.options import log, print_json, sku_command

PEFT_SCRIPT = """
import sys, time, json
import_started = time.perf_counter()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="600MB")
import os
for name in os.listdir(sys.argv[3]):
    with open(os.path.join(sys.argv[3], name), "rb") as file:
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


@sku_command("fuse")
@click.option("--size", type=click.Choice(list(SIZES)), default="1.1B", help="Parameters of the checkpoint to make.")
@click.option("--runs", default=5, help="Interleaved runs of each contender.")
@click.option("--peft-runs", default=2, help="Runs of PEFT and mergekit, which take several times longer.")
@click.option("--settle", default=0.0, help="Seconds to wait before every run, as a machine does before somebody types a command.")
@click.option("--mergekit", help="A Python with mergekit installed, of an environment of its own.")
@click.option("--memory", is_flag=True, help="Only peak memory, over all sizes; of files full of holes, which need little disk.")
@click.option("--directory", type=click.Path(file_okay=False), help="Where to work (about 3 checkpoints); a temporary directory otherwise.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(
    size: str,
    runs: int,
    peft_runs: int,
    settle: float,
    mergekit: str | None,
    memory: bool,
    directory: str | None,
    output: str | None,
    json_output: bool,
) -> None:
    """Fuse against cp, PEFT and mergekit: seconds, ratios, peak anonymous memory."""
    with tempfile.TemporaryDirectory(dir=directory) as work:
        results = measure_memory(Path(work)) if memory else measure(Path(work), size, runs, peft_runs, settle, mergekit)
    text = memory_markdown(results) if memory else markdown(results)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    if json_output:
        print_json(results)
    else:
        click.echo(text)


def measure_memory(work: Path) -> dict[str, Any]:
    """{"machine", "rows": {size: {"bytes", "tensors", "memory_mb"}}}."""
    rows = {}
    for size in SIZES:
        base = make_base(work / size / "base", size, sparse=True)
        adapter = make_adapter(base, work / size / "adapter", ("q_proj", "v_proj"))
        with fuse_process() as fuse:
            found = fuse(base, adapter, work / size / "out", True)
        report = json.loads((work / size / "out/sku_fuse.json").read_text())
        rows[size] = {"bytes": report["bytes"], "tensors": report["tensors"], "memory_mb": found["memory_mb"]}
        log(f"{size}: {found['memory_mb']:.0f} MB above imports for a checkpoint of {report['bytes'] / 1e9:.1f} GB")
        shutil.rmtree(work / size)
    return {"machine": machine(), "rows": rows}


def measure(work: Path, size: str, runs: int, peft_runs: int, settle: float, mergekit: str | None) -> dict[str, Any]:
    """{"size", "bytes", "settle", "machine", "rows": {name: {"seconds", "ratio", "runs", "memory_mb"?, "wall"?}}}."""
    log(f"making a {size} checkpoint in {work}")
    base = make_base(work / "base", size)
    adapters = {"q,v": make_adapter(base, work / "qv", ("q_proj", "v_proj")), "all linear": make_adapter(base, work / "all", None)}
    target = work / "out"
    contenders: dict[str, Callable[[], dict[str, Any]]] = {"cp -r + sync": lambda: {"seconds": timed(lambda: copy(base, target))}}
    with fuse_process() as fuse:
        for kind, adapter in adapters.items():
            for flag in (False, True):
                name = f"sku fuse, {kind}, {'with' if flag else 'no'} digests"
                contenders[name] = partial(fuse, base, adapter, target, flag)
        slow: dict[str, Callable[[], dict[str, Any]]] = {}
        for kind, adapter in adapters.items():
            slow[f"sku fuse CLI, {kind}, with digests"] = partial(cli, base, adapter, target)
            slow[f"PEFT, {kind}"] = partial(peft, base, adapter, target)
            if mergekit:
                slow[f"mergekit, {kind}"] = partial(run_mergekit, mergekit, base, adapter, target)
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in range(runs):
            for name, contender in {**contenders, **(slow if turn < peft_runs else {})}.items():
                shutil.rmtree(target, ignore_errors=True)
                copy(base, target)
                shutil.rmtree(target)
                os.sync()
                time.sleep(settle)
                found.setdefault(name, []).append(contender())
                log(f"run {turn + 1}/{runs}: {name}: {found[name][-1]['seconds']:.2f} s")
    rows = {name: summary(values) for name, values in found.items()}
    for row in rows.values():
        row["ratio"] = row["seconds"] / rows["cp -r + sync"]["seconds"]
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return {"size": size, "bytes": nbytes, "settle": settle, "machine": machine(), "rows": rows}


def summary(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one contender: median seconds, how many, and where measured the most memory and the median wall time."""
    row: dict[str, Any] = {"seconds": statistics.median(value["seconds"] for value in values), "runs": len(values)}
    if "memory_mb" in values[0]:
        row["memory_mb"] = max(value["memory_mb"] for value in values)
    if "wall" in values[0]:
        row["wall"] = statistics.median(value["wall"] for value in values)
    return row


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def copy(base: Path, target: Path) -> None:
    """`cp -r`, every file synced."""
    subprocess.run(["cp", "-r", str(base), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir()), str(target)], check=True)


@contextmanager
def fuse_process() -> Iterator[Callable[[Path, Path, Path, bool], dict[str, Any]]]:
    """A process that has imported everything and fuses on request, reporting seconds and peak anonymous memory above its imports."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "sku_vllm.benchmarks.bench_fuse"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # as the command line sets it
    )

    asked, told = worker.stdin, worker.stdout
    assert asked and told, "both are pipes"

    def fuse(base: Path, adapter: Path, target: Path, digests: bool) -> dict[str, Any]:
        asked.write(json.dumps([str(base), str(adapter), str(target), digests]) + "\n")
        asked.flush()
        measured: dict[str, Any] = json.loads(told.readline())
        return measured

    try:
        yield fuse
    finally:
        asked.close()
        worker.wait()


def serve_fuse() -> None:
    """The other side of `fuse_process`."""
    import numpy as np  # noqa: F401  (imports are not what is measured)
    import torch

    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest
    from sku_vllm.kernels.delta_merge.cpu_kernel import load_round_rows

    load_round_rows()
    torch.ones(8, 8) @ torch.ones(8, 8)  # the BLAS allocates its own buffers once
    start = anonymous()
    for line in sys.stdin:
        base, adapter, target, digests = json.loads(line)
        with peak_memory() as peak:
            seconds = timed(partial(fuse_checkpoint, FuseRequest(base, [(adapter, 1.0)], target, digests=digests)))
        print(json.dumps({"seconds": seconds, "memory_mb": (peak[0] - start) / 1e6}), flush=True)


def anonymous() -> int:
    """Anonymous resident memory of this process in bytes (mapped files are the page cache's)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields a list of one number: the most anonymous memory of the block so far, in bytes, looked at every 10 ms."""
    peak, stop = [anonymous()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def cli(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """`sku fuse` as a command: wall time, and what it reports of itself."""
    command = [sys.executable, "-m", "sku_vllm.cli", "fuse", "--model", base, "--adapter", adapter, "--output", target, "--json"]
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return {"seconds": time.perf_counter() - started, "wall": time.perf_counter() - started, "inside": json.loads(done.stdout)["seconds"]}


def peft(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """PEFT's merge_and_unload and save_pretrained, in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEFT_SCRIPT, str(base), str(adapter), str(target)], check=True, capture_output=True, text=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - started}


def run_mergekit(python: str, base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """`base+adapter` passed through; the model and LoRA are read as mergekit reads them."""
    config = target.with_suffix(".yml")
    config.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n", encoding="utf-8")
    command = [
        python,
        "-m",
        "mergekit.scripts.run_yaml",
        str(config),
        str(target),
        "--copy-tokenizer",
        "--lora-merge-cache",
        str(target) + "-lora",
    ]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    shutil.rmtree(str(target) + "-lora", ignore_errors=True)
    return {"seconds": seconds, "wall": seconds}


if __name__ == "__main__":
    serve_fuse()
