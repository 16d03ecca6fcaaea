"""The commands of docs/gpu.md for two machines, as two launches on this one (gloo, CPU)."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sku_vllm.data import load_dataset
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.train.train_request import TrainRequest


def free_port() -> int:
    """Below the range that the system gives to others, who would else take it in the ten seconds until the launcher listens."""
    for port in range(20_000, 30_000):
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


@pytest.mark.slow
def test_two_machines_equal_one_process(trainable: Path, tmp_path: Path) -> None:
    port = free_port()
    launch = ["--multi_gpu", "--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1", "--mixed_precision", "no"]
    train = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    train = [*train, "--output", tmp_path / "two", "--method", "sku", "--steps", 4, "--batch-size", 8]
    begun = []
    for rank in (0, 1):
        where = [*launch, "--main_process_port", port, "--machine_rank", rank]
        command = [sys.executable, "-m", "accelerate.commands.launch", *where, "-m", "sku_vllm.cli", "train", *train]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with open(tmp_path / f"{rank}.log", "w") as log:
            begun.append(subprocess.Popen([str(part) for part in command], env=environment, stderr=log))
    for process in begun:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=600)
    ended = [process.poll() for process in begun]
    for process in begun:
        process.terminate()  # its trainer ends with it
    said = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert ended == [0, 0], said
    assert "harmful knowledge" in said[0] and "harmful knowledge" not in said[1]  # the first machine speaks
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of("sku", steps=4, batch_size=8)
    train_adapter(TrainRequest(trainable / "llama", *sets, tmp_path / "one", config), progress=False)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
