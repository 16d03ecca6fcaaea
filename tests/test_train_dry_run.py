"""What `sku train --dry-run` promises, against what the run then takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sku_vllm.benchmarks.bench_dry_run import compare, make_models
from sku_vllm.data import load_dataset, read_rows
from sku_vllm.methods import METHODS, TrainConfig, train_adapter
from sku_vllm.methods.estimate import estimate_run

FULL = {method: {"full": True} for method in ("sku", "task-vector")}
# One shape for each way to need memory; `sku bench dry-run` measures all of them.
MEASURED = (
    "llama, the same, gradient checkpointing", "llama, the same, 512 tokens a pass", "llama, the same, bfloat16",
    "opt, sku-contrastive-two", "opt, sku --full (a frozen copy)",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "more"), [*((method, {}) for method in METHODS), *FULL.items()], ids=[*METHODS, *(f"{method}-full" for method in FULL)]
)
def test_it_counts_what_the_run_counts(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, object]
) -> None:
    """Every method, in rounds and with terms that begin later. What a run draws itself may be longer or shorter here."""
    monkeypatch.setattr("sku_vllm.methods.sampling.REFUSALS_NEEDED", 0.0)  # a random base cannot refuse
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of(method, steps=8, batch_size=4, samples=8, sample_tokens=6, **more)
    refusals = {"refusals": read_rows(trainable / "retain.jsonl")}
    promise = estimate_run(trainable / "llama", *sets, config, **refusals)
    assert not list(tmp_path.iterdir())
    truth = train_adapter(trainable / "llama", *sets, tmp_path / "adapter", config, progress=False, **refusals)
    for name in ("method", "parameters", "trainable", "steps", "packed"):
        assert getattr(promise, name) == getattr(truth, name), name
    assert promise.tokens_per_step * promise.steps == pytest.approx(truth.tokens, rel=0.05 if "contrastive" in method else 1e-9)


def test_steps_in_a_rhythm_are_counted_in_proportion(trainable: Path) -> None:
    """768 steps are more than are looked at, and every third is one without the adversary."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    settings = {"batch_size": 4, "samples": 8, "sample_tokens": 6}
    few, many = (estimate_run(trainable / "llama", *sets, TrainConfig.of(steps=steps, **settings)) for steps in (256, 1024))
    assert many.tokens_per_step == pytest.approx(few.tokens_per_step, rel=0.05)


def test_the_command_prints_it_and_writes_nothing(
    trainable: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]
) -> None:
    data = ["--model", trainable / "opt", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    done = run_sku("train", *data, "--output", tmp_path / "adapter", "--method", "sku-mirrored", "--steps", 4, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["steps"] == 12 and printed["seconds"] > 0 and printed["peak_memory_bytes"] > printed["parameters"] * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]], ids=["ddp", "fsdp2"])
def test_it_counts_over_all_processes_and_one_speaks(
    trainable: Path, engine: list[str], run_sku: Callable[..., subprocess.CompletedProcess]
) -> None:
    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    train = ["train", *data, "--output", trainable / "nowhere", "--method", "sku-mirrored", "--steps", 4, "--dry-run", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *engine, "--num_processes", 2, "--main_process_port", 0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [str(part) for part in [*launch, "-m", "sku_vllm.cli", *train]]
    two = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert two.returncode == 0, two.stderr[-3000:]
    (printed,) = map(json.loads, two.stdout.strip().splitlines())
    one = json.loads(run_sku(*train).stdout)
    for name in ("parameters", "trainable", "steps", "tokens_per_step"):
        assert printed[name] == one[name], name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer over 32k words: 56M parameters as a Llama."""
    work = tmp_path_factory.mktemp("models")
    make_models(work, layers=1)
    return work


@pytest.mark.slow
@pytest.mark.parametrize("shape", MEASURED)
def test_memory_and_time_are_within_a_fifth(models: Path, shape: str) -> None:
    """In CPU time, since other work shares the cores, which still costs it some of its caches: the better of two pairs for time."""
    pairs = [compare(shape, models)["ratios"]]
    if abs(pairs[0]["seconds"] - 1) > 0.2:
        pairs.append(compare(shape, models)["ratios"])
    assert all(abs(ratios["bytes"] - 1) <= 0.2 and abs(ratios["tokens_per_step"] - 1) <= 0.1 for ratios in pairs), pairs
    assert min(abs(ratios["seconds"] - 1) for ratios in pairs) <= 0.2, pairs
