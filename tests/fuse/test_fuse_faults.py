"""What fusing leaves behind when it is killed, runs out of disk, may not write, or its base changes: nothing under the final name."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import CheckpointError, ConfigError, InputError, SkuError
from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest

SHAPE = (1024, 4096)


def make_base(directory: Path, shards: int = 2, per_shard: int = 2) -> Path:
    """Plain Llama-like names, no config: 8 MiB a tensor."""
    directory.mkdir()
    torch.manual_seed(0)
    weight_map = {}
    for shard in range(shards):
        names = [f"model.layers.{shard * per_shard + index}.self_attn.q_proj.weight" for index in range(per_shard)]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: (torch.randn(SHAPE) * 0.02).bfloat16() for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


def make_adapter(directory: Path, layers: list[int], shape: tuple[int, int] = SHAPE) -> Path:
    directory.mkdir()
    tensors = {}
    for layer in layers:
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, shape[1]) * 0.01
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], 8) * 0.01
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}))
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("faults")
    return make_base(root / "base"), make_adapter(root / "adapter", [0, 1, 2, 3])


KILLED = """
import os, sys
from sku_vllm.fuse import FuseRequest, fuse_checkpoint
import torch, numpy
import sku_vllm.fuse.fuse
from sku_vllm.kernels.delta_merge.cpu_kernel import load_round_rows
load_round_rows()
for line in sys.stdin:  # imported once; every request is a child that gets killed
    output = line.strip()
    child = os.fork()
    if not child:
        fuse_checkpoint(FuseRequest(sys.argv[1], [(sys.argv[2], 1.0)], output))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_fifty_random_moments_leaves_nothing_or_everything(pair, tmp_path):
    base, adapter = pair
    server = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(base), str(adapter)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(output: Path, after: float | None) -> float:
        server.stdin.write(f"{output}\n")
        server.stdin.flush()
        child, started = int(server.stdout.readline()), time.perf_counter()
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
        assert server.stdout.readline() == "ended\n"
        return time.perf_counter() - started

    try:
        whole = min(run(tmp_path / f"whole{index}", None) for index in range(2))
        wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole0").iterdir() if file.name != "sku_fuse.json"}
        chance, complete, partial = random.Random(0), 0, 0
        for _ in range(50):
            output = tmp_path / "out"
            run(output, chance.uniform(0, 1.4 * whole))
            partial += output.with_name("out.partial").exists()
            if output.exists():
                complete += 1
                found = {file.name: file.read_bytes() for file in output.iterdir() if file.name != "sku_fuse.json"}
                assert found == wanted and (output / "sku_fuse.json").exists()
                shutil.rmtree(output)
        assert partial > 5, "too few kills hit the middle of the work to show anything"
        run(tmp_path / "out", None)  # what a killed run left is no obstacle
        verify_checkpoint(tmp_path / "out")
    finally:
        server.stdin.close()
        server.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB, too small for the output."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_noticed_before_and_while_writing(pair, small_disk, monkeypatch):
    base, adapter = pair
    with pytest.raises(SkuError, match="GB free"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], small_disk / "out"))
    monkeypatch.setattr("sku_vllm.fuse.fuse.check_space", lambda *arguments: None)  # as if the disk filled up meanwhile
    for digests in (True, False):
        with pytest.raises(SkuError, match="No space left on device; nothing was written there") as error:
            fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], small_disk / "out", digests=digests))
        assert error.value.exit_code == 3
        assert list(small_disk.iterdir()) == []


def test_read_only_target(pair, small_disk):
    base, adapter = pair
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="not a writable directory"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], small_disk / "out"))


@pytest.mark.parametrize("change", ["touch", "truncate"])
def test_base_that_changes_while_it_is_read(pair, tmp_path, change):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    shard = sorted(base.glob("*.safetensors"))[-1]
    changed = threading.Event()

    def progress(done: int, total: int) -> None:
        if not changed.is_set():
            changed.set()
            if change == "touch":
                os.utime(shard, ns=(1, 1))
            else:
                os.truncate(shard, shard.stat().st_size - (8 << 20))

    with pytest.raises(SkuError, match="changed while it was read"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "out"), progress=progress)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_adapter_that_changes_while_it_is_read(pair, tmp_path):
    """Its factors are read again for every chunk, and the manifest names one digest."""
    base, adapter = pair[0], shutil.copytree(pair[1], tmp_path / "adapter")

    def progress(done: int, total: int) -> None:
        os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))

    with pytest.raises(SkuError, match=f"{adapter}: changed while it was read"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "out"), progress=progress)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]


def test_interrupt_stops_the_threads_and_leaves_nothing(pair, tmp_path):
    base, adapter = pair

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "out"), progress=progress)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before


def test_overflow_is_an_error_not_an_infinity(pair, tmp_path):
    base, adapter = pair
    with pytest.raises(SkuError, match="too large"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1e9)], tmp_path / "out", dtype="float16"))
    assert list(tmp_path.iterdir()) == []


SPARSE = """
import json, sys
from sku_vllm.benchmarks.bench_fuse import anonymous, peak_memory
from sku_vllm.fuse import FuseRequest, fuse_checkpoint
import torch
import sku_vllm.fuse.fuse
torch.ones(8, 8) @ torch.ones(8, 8)
start = anonymous()
with peak_memory() as peak:
    report = fuse_checkpoint(FuseRequest(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], digests=False))
print(json.dumps({"peak": peak[0] - start, "bytes": report.bytes, "tensors": report.tensors, "seconds": report.seconds}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """140 GB of bf16 in one sparse file: 2 of its 600 tensors are touched, the holes stay holes."""
    base, rows, columns, layers = tmp_path / "base", 8192, 14336, 600
    base.mkdir()
    nbytes = rows * columns * 2
    header = {
        f"model.layers.{layer}.self_attn.q_proj.weight": {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [layer * nbytes, (layer + 1) * nbytes],
        }
        for layer in range(layers)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(base / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * nbytes)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    adapter = make_adapter(tmp_path / "adapter", [0, 599], (rows, columns))
    done = subprocess.run([sys.executable, "-c", SPARSE, base, adapter, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] > 140e9 and result["tensors"] == 2
    assert result["peak"] < 300e6, result
    occupied = os.stat(tmp_path / "out/model.safetensors").st_blocks * 512
    assert 2 * nbytes <= occupied < 3 * nbytes
    fused = CheckpointReader(tmp_path / "out")
    assert fused.tensor("model.layers.599.self_attn.q_proj.weight").any()


@pytest.mark.slow
def test_memory_is_flat_over_model_sizes(tmp_path):
    """0.5, 1.1 and 3B parameters, as the benchmark measures them."""
    from sku_vllm.benchmarks.bench_fuse import measure_memory

    rows = measure_memory(tmp_path)["rows"]
    peaks = [rows[size]["memory_mb"] for size in ("0.5B", "1.1B", "3B")]
    assert rows["3B"]["bytes"] > 5 * rows["0.5B"]["bytes"] and max(peaks) < 300 and max(peaks) - min(peaks) < 50, rows


def test_pickled_and_damaged_checkpoints_are_refused_with_the_remedy(pair, tmp_path):
    base, adapter = pair
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        fuse_checkpoint(FuseRequest(tmp_path / "pickled", [(adapter, 1.0)], tmp_path / "out"))
    damaged = shutil.copytree(base, tmp_path / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard.name):
        fuse_checkpoint(FuseRequest(damaged, [(adapter, 1.0)], tmp_path / "out"))
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing shard"):
        fuse_checkpoint(FuseRequest(damaged, [(adapter, 1.0)], tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is an adapter"):
        fuse_checkpoint(FuseRequest(adapter, [(adapter, 1.0)], tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def end(*arguments: object) -> None:
        raise TimeoutError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to nothing"])
@pytest.mark.parametrize(
    "name",
    [
        "base/config.json",
        "base/model.safetensors.index.json",
        "base/model-00001-of-00002.safetensors",
        "base/tokenizer.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/sku_run.json",
    ],
)
def test_what_lies_in_a_files_place_is_neither_waited_for_nor_left_out(in_time, tmp_path, name, kind):
    base, adapter = make_base(tmp_path / "base", per_shard=1), make_adapter(tmp_path / "adapter", [0])
    (base / "pytorch_model.bin").symlink_to("nowhere")  # weights that nobody reads are no obstacle
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/null" if kind == "a device" else "nowhere")
    with pytest.raises(InputError, match=f"{file}: is {'a link that leads' if 'link' in kind else 'a pipe, socket or device'}"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_pipe_beside_a_single_file_is_not_waited_for(in_time, tmp_path):
    base, adapter = make_base(tmp_path / "base", shards=1, per_shard=1), make_adapter(tmp_path / "adapter", [0])
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe"):
        fuse_checkpoint(FuseRequest(base / "model-00001-of-00001.safetensors", [(adapter, 1.0)], tmp_path / "out"))
