"""kill −9 at any step, `--resume`, and the bits of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.data import load_dataset
from sku_vllm.errors import ConfigError
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.output import partial_path
from sku_vllm.train import targets
from sku_vllm.train.run import Run
from sku_vllm.train.train_request import TrainRequest


def arguments(trainable: Path, output: Path, *more: object) -> list[str]:
    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    given = ["train", *data, "--output", output, "--method", "sku-mirrored", "--steps", 8, "--rounds", 2, "--save-seconds", 0, *more]
    return [str(argument) for argument in given]


def history_length(partial: Path) -> int:
    path = partial / "history.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def kill_at(command: list[str], partial: Path, step: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sku_vllm.cli", *command], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 900
    while history_length(partial) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(
    trainable: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]
) -> None:
    one_thread = {"OMP_NUM_THREADS": "1"}
    whole = run_sku(*arguments(trainable, tmp_path / "whole"), env=one_thread)
    assert whole.returncode == 0, whole.stderr
    output, partial = tmp_path / "killed", partial_path(tmp_path / "killed")
    draw = random.Random(os.urandom(4))
    # Once inside the first round, once inside the second, whose base is the first one folded in.
    for step in (draw.randint(2, 6), draw.randint(10, 14)):
        kill_at(arguments(trainable, output, "--resume"), partial, step)
        assert partial.is_dir() and not output.exists()
    changed = run_sku(*arguments(trainable, output, "--resume", "--lr", 1e-5), env=one_thread)
    assert changed.returncode == 2 and "has lr = 0.0015" in changed.stderr
    resumed = run_sku(*arguments(trainable, output, "--resume", "--json"), env=one_thread)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_from"] >= 9
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    losses = [
        [json.loads(line)["losses"] for line in (place / "history.jsonl").read_text().splitlines()]
        for place in (output, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 16
    assert not partial.exists() and not (output / "checkpoint").exists()


@pytest.mark.slow
def test_killed_and_resumed_with_all_weights(trainable: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]) -> None:
    """`--full`: the checkpoint holds the weights themselves."""
    flags = ["--method", "task-vector", "--full", "--rounds", 1]
    one_thread = {"OMP_NUM_THREADS": "1"}
    assert run_sku(*arguments(trainable, tmp_path / "whole", *flags), env=one_thread).returncode == 0
    kill_at(
        arguments(trainable, tmp_path / "killed", *flags), partial_path(tmp_path / "killed"), random.Random(os.urandom(4)).randint(2, 6)
    )
    resumed = run_sku(*arguments(trainable, tmp_path / "killed", *flags, "--resume", "--json"), env=one_thread)
    assert resumed.returncode == 0 and json.loads(resumed.stdout)["resumed_from"] >= 1, resumed.stderr
    assert (tmp_path / "killed/task_vector.safetensors").read_bytes() == (tmp_path / "whole/task_vector.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_with_the_default_method(lab: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]) -> None:
    """Once before its samples are drawn, once after: samples, the adapter that was kept and the adversary are in the checkpoint."""
    sets = ["--forget", lab / "forget/train.jsonl", "--retain", lab / "retain/train.jsonl"]
    flags = ["--method", "sku-contrastive-two", "--steps", 60, "--rounds", 1, "--batch-size", 4, *sets]
    one_thread = {"OMP_NUM_THREADS": "1"}
    assert run_sku(*arguments(lab, tmp_path / "whole", *flags), env=one_thread).returncode == 0
    output, draw = tmp_path / "killed", random.Random(os.urandom(4))
    for step in (draw.randint(3, 12), draw.randint(18, 50)):
        kill_at(arguments(lab, output, *flags, "--resume"), partial_path(output), step)
    resumed = run_sku(*arguments(lab, output, *flags, "--resume", "--json"), env=one_thread)
    assert resumed.returncode == 0 and json.loads(resumed.stdout)["resumed_from"] >= 17, resumed.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_settings_of_an_unfinished_run_are_one_line(trainable: Path, tmp_path: Path, text: str) -> None:
    output = tmp_path / "adapter"
    partial_path(output).mkdir()
    (partial_path(output) / "train_config.json").write_text(text)
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    request = TrainRequest(trainable / "llama", *sets, output, TrainConfig.of("sku-mirrored", steps=1), resume=True)
    with pytest.raises(ConfigError, match="--resume: .*train_config.json: .*; leave out --resume to start over") as caught:
        train_adapter(request, progress=False)
    assert "\n" not in str(caught.value)


def test_what_was_drawn_is_kept_at_once(trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before a checkpoint is due: drawing may take longer than many steps."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of(targets="given", steps=8, samples=8, batch_size=2)
    whole, parts = (TrainRequest(trainable / "llama", *sets, tmp_path / name, config, save_seconds=1e6) for name in ("whole", "parts"))
    train_adapter(whole, progress=False)
    step = Run.step

    def stopping(run: Run) -> dict[str, Any]:
        if run.at == 1:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "step", stopping)
        train_adapter(parts, progress=False)
    monkeypatch.setattr(targets, "draw_refusals", None)  # and so not drawn again
    assert train_adapter(replace(parts, resume=True), progress=False).resumed_from == 1
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(trainable: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    command = [sys.executable, "-m", "sku_vllm.cli", *arguments(trainable, output, "--save-seconds", 1e6, "--steps", 1000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while history_length(partial_path(output)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "error: interrupted" in errors
    assert not list(tmp_path.iterdir())
