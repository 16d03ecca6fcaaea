"""Two processes do the work of one with twice the batch (gloo, CPU, accelerate's DDP)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


def launch(processes: int, output: Path, trainable: Path, *more: object) -> dict:
    # What `accelerate launch` itself starts for several processes, but for CPUs, where it wants mpirun.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m", "sku_vllm.cli", "train",
               "--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl", "--output", output,
               "--steps", 4, "--batch-size", 8, "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sku", "sku-mirrored"])
def test_two_processes_equal_one(trainable: Path, tmp_path: Path, method: str) -> None:
    """--batch-size counts over all processes, so the same settings are the same batch."""
    reports = [launch(count, tmp_path / str(count), trainable, "--method", method) for count in (1, 2)]
    one, two = (load_file(tmp_path / str(count) / "adapter_model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5
    assert max(float(one[key].abs().max()) for key in one if "lora_B" in key) > 1e-3
    for name, value in reports[0]["losses"].items():
        assert reports[1]["losses"][name] == pytest.approx(value, abs=1e-5)
    assert reports[0]["tokens"] == reports[1]["tokens"]
