"""What `sku train --dry-run` promises, against what the run then takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sku_vllm.benchmarks.bench_dry_run import compare, make_models
from sku_vllm.data import load_dataset
from sku_vllm.methods import METHODS, TrainConfig, train_adapter
from sku_vllm.train.dry_run import estimate_run
from sku_vllm.train.train_request import TrainRequest

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
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED", {"latent": 0.0})  # a random base cannot refuse
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED_EARLY", 0.0)
    monkeypatch.setattr("sku_vllm.train.targets.REFUSES", 0.0)
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of(method, steps=8, batch_size=4, samples=8, sample_tokens=6, **more)
    refusals = [replace(row, response="I can't help with that.") for row in sets[0].rows] if method == "refusal-tune" else ()
    request = TrainRequest(trainable / "llama", *sets, tmp_path / "adapter", config, refusals=refusals)
    promise = estimate_run(request)
    assert not list(tmp_path.iterdir())
    truth = train_adapter(request, progress=False)
    for name in ("method", "parameters", "trainable", "steps", "packed"):
        assert getattr(promise, name) == getattr(truth, name), name
    assert promise.tokens_per_step * promise.steps == pytest.approx(truth.tokens, rel=0.05 if "contrastive" in method else 1e-9)


@pytest.mark.parametrize("method", ["sku-mirrored", "sku-contrastive-two"])
def test_without_time_it_extrapolates_from_fewer_rows(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It says so, counts as many tokens (drawn rows aside), and needs about the memory of whole steps."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    request = TrainRequest(
        trainable / "llama", *sets, "nowhere", TrainConfig.of(method, steps=8, batch_size=8, samples=40, sample_tokens=6)
    )
    whole = estimate_run(request)
    monkeypatch.setattr("sku_vllm.train.dry_run.BUDGET_S", 0.0)
    said: list[str] = []
    part = estimate_run(request, said.append)
    assert part.tokens_per_step == pytest.approx(whole.tokens_per_step, rel=0.25 if "contrastive" in method else 1e-9)
    assert part.peak_memory_bytes == pytest.approx(whole.peak_memory_bytes, rel=0.3) and part.seconds > 0
    assert said[0] == "dry run: reading the rows and loading the model" and any("(1 of " in line for line in said)
    extrapolated = [line for line in said if line.startswith("dry run: extrapolated")]
    assert any("from one of 1 of 8 rows" in line for line in extrapolated)
    assert any("draws of 40 answers: from 8 answers" in line for line in extrapolated) == ("contrastive" in method)


def test_steps_in_a_rhythm_are_counted_in_proportion(trainable: Path) -> None:
    """768 steps are more than are looked at, and every third is one without the adversary."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    settings = {"batch_size": 4, "samples": 8, "sample_tokens": 6}
    few, many = (
        estimate_run(TrainRequest(trainable / "llama", *sets, "nowhere", TrainConfig.of(steps=steps, **settings))) for steps in (256, 1024)
    )
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
    """In CPU time, since other work shares the cores, which still costs it some of its caches: the best of up to four pairs for time."""
    pairs: list[dict[str, float]] = []
    while len(pairs) < 4 and not any(abs(ratios["seconds"] - 1) <= 0.2 for ratios in pairs):
        pairs.append(compare(shape, models)["ratios"])
    assert all(abs(ratios["bytes"] - 1) <= 0.2 and abs(ratios["tokens_per_step"] - 1) <= 0.1 for ratios in pairs), pairs
    assert min(abs(ratios["seconds"] - 1) for ratios in pairs) <= 0.2, pairs
