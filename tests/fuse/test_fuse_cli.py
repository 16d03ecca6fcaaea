"""`sku negate`, `sku fuse` and `sku verify` as a person or a script runs them: JSON, exit codes, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.errors import ConfigError
from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    (root / "base").mkdir()
    save_file({f"{NAME}.weight": torch.randn(48, 64).bfloat16()}, root / "base/model.safetensors", metadata={"format": "pt"})
    (root / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    (root / "base/chat_template.jinja").write_text("{{ messages }}")
    (root / "adapter@2").mkdir()
    factors = {f"base_model.model.{NAME}.lora_A.weight": torch.randn(4, 64), f"base_model.model.{NAME}.lora_B.weight": torch.randn(48, 4)}
    save_file(factors, root / "adapter@2/adapter_model.safetensors")
    (root / "adapter@2/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return root / "base", root / "adapter@2"


def test_fuse_and_verify(run_sku, pair, tmp_path):
    base, adapter = pair  # the path itself holds an @: only the last one splits off the scale
    done = run_sku("fuse", "--model", base, "--adapter", f"{adapter}@0.5", "--output", tmp_path / "out", "--simulate", "int4,fp8", "--json")
    assert done.returncode == 0, done.stderr
    printed, recorded = json.loads(done.stdout), json.loads((tmp_path / "out/sku_fuse.json").read_text())
    assert printed["adapters"][0]["scale"] == 0.5 and printed["tensors"] == 1 and set(printed["simulated"]) == {"int4", "fp8"}
    assert printed["fp8_scales"] is None and printed["plain_copy"]["ratio"] > 0 and "a plain copy" not in done.stdout
    assert recorded["schema"] == "sku.fuse/1" and {key: recorded[key] for key in printed} == printed and "torch" in recorded["versions"]
    manifest = json.loads((tmp_path / "out/sku_manifest.json").read_text())
    assert set(manifest["tensors"][f"{NAME}.weight"]) == {"retained", "noise", "int4", "fp8"}
    assert {"model.safetensors", "config.json", "chat_template.jinja"} <= set(manifest["files"])
    done = run_sku("verify", tmp_path / "out", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["verified"]
    (tmp_path / "out/chat_template.jinja").write_text("other")
    done = run_sku("verify", tmp_path / "out")
    assert done.returncode == 1 and "chat_template.jinja" in done.stderr and "Traceback" not in done.stderr


def test_the_first_run_on_a_machine_says_that_it_compiles_and_the_second_has_no_need_to(run_sku, pair, tmp_path):
    base, adapter = pair
    runs = []
    for name in ("first", "second"):
        arguments = ["--model", base, "--adapter", f"{adapter}@0.05", "--output", tmp_path / name, "--json"]
        runs.append(run_sku("fuse", *arguments, env={"NUMBA_CACHE_DIR": str(tmp_path / "cache")}))
        assert runs[-1].returncode == 0, runs[-1].stderr
    first, second = (json.loads(done.stdout) for done in runs)  # nothing but the report on stdout
    assert "compiling the merge" in runs[0].stderr and f"kept in {tmp_path / 'cache'}" in runs[0].stderr
    assert "compil" not in runs[1].stderr and second["setup_seconds"] < first["setup_seconds"]
    assert first["seconds"] < first["setup_seconds"], "compiling is no part of reading, merging and writing"
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_negated_adapter_is_refused_with_exit_2_and_nothing_written(run_sku, pair, tmp_path):
    base, adapter = pair
    done = run_sku("negate", "--adapter", adapter, "--scale", 0.5, "--output", tmp_path / "negated", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["scale"] == 0.5
    done = run_sku("fuse", "--model", base, "--adapter", tmp_path / "negated", "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--as-is" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_flags_that_do_not_apply_are_refused_in_one_line(run_sku, pair, tmp_path):
    base, adapter = pair
    done = run_sku("fuse", "--model", base, "--adapter", f"{adapter}@1", "--output", tmp_path / "out", "--fp8-scales", "recompute")
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "no edited tensor" in done.stderr and "leave the flag out" in done.stderr
    )
    assert not list(tmp_path.glob("out*"))


def test_a_signing_key_may_come_from_a_pipe_and_is_no_device(pair, tmp_path):
    base, adapter = pair
    (tmp_path / "key").write_bytes(bytes(range(32)))
    command = 'exec "$0" -m sku_vllm.cli fuse --model "$1" --adapter "$2@1" --output "$3" --signing-key <(cat "$4")'
    arguments = ["bash", "-c", command, sys.executable, str(base), str(adapter), str(tmp_path / "out"), str(tmp_path / "key")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert verify_checkpoint(tmp_path / "out", tmp_path / "key")["signed"]
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "endless", signing_key="/dev/zero"))


def test_no_digests_leave_nothing_to_verify(run_sku, pair, tmp_path):
    base, adapter = pair
    (tmp_path / "scales.json").write_text(json.dumps({"layers.0": 0.25}))
    arguments = ["--adapter", f"{adapter}@1", "--layer-scales", tmp_path / "scales.json", "--no-digests"]
    done = run_sku("fuse", "--model", base, *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0 and "files" not in json.loads((tmp_path / "out/sku_manifest.json").read_text())
    done = run_sku("verify", tmp_path / "out")
    assert done.returncode == 2 and "--no-digests" in done.stderr


@pytest.fixture
def tuned(pair, tmp_path) -> Path:
    """What sku tune leaves where it chose scale 0.25."""
    (tmp_path / "tuned").mkdir()
    record = {"schema": "sku.tune/1", "scale": 0.25, "config": {"adapter": str(pair[1])}}
    (tmp_path / "tuned/sku_tune.json").write_text(json.dumps(record))
    return tmp_path / "tuned"


def contents(directory: Path, record: str) -> dict[str, bytes]:
    """Every file's bytes; of the record its configuration alone, since the rest has times in it."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    return files | {record: json.dumps(json.loads(files[record])["config"]).replace(directory.name, "OUT").encode()}


def test_tuned_is_the_adapter_at_the_scale_that_tune_chose(run_sku, pair, tuned, tmp_path):
    base, adapter = pair
    for name, which in (("by-hand", ["--adapter", f"{adapter}@0.25"]), ("by-tune", ["--tuned", tuned])):
        done = run_sku("fuse", "--model", base, *which, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "by-hand", "sku_fuse.json") == contents(tmp_path / "by-tune", "sku_fuse.json")
    for name, which in (("negated-by-hand", ["--adapter", adapter, "--scale", 0.25]), ("negated-by-tune", ["--tuned", tuned])):
        done = run_sku("negate", *which, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "negated-by-hand", "sku_negate.json") == contents(tmp_path / "negated-by-tune", "sku_negate.json")


@pytest.mark.parametrize("command", ["fuse", "negate"])
def test_adapter_and_scale_are_said_once(run_sku, pair, tuned, tmp_path, command):
    base, adapter = pair
    common = ["--output", tmp_path / "out", *(["--model", base] if command == "fuse" else [])]
    for given, words in (
        (["--tuned", tuned, "--adapter", adapter], ("--tuned", "--adapter")),
        (["--tuned", tuned, "--scale", 1], ("--tuned", "--scale")),
        ([], ("--adapter", "--tuned DIR")),
        (["--tuned", adapter], ("--tuned", "sku_tune.json")),
    ):
        done = run_sku(command, *given, *common)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.glob("out*"))


def test_the_cards_say_what_can_be_done_with_what_they_lie_beside(run_sku, pair, tmp_path):
    base, adapter = pair
    assert run_sku("fuse", "--model", base, "--adapter", f"{adapter}@1", "--output", tmp_path / "fused").returncode == 0
    assert "recover the harmful knowledge" in (tmp_path / "fused/README.md").read_text()
    assert run_sku("negate", "--adapter", adapter, "--output", tmp_path / "negated").returncode == 0
    assert "`sku serve` refuse it" in (tmp_path / "negated/README.md").read_text()
