"""`sku verify` on directories that somebody else has had a hand in: it opens regular files of that directory, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest
from tests.fuse.test_fuse_faults import make_adapter, make_base


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    base, adapter = make_base(root / "base", shards=1, per_shard=1), make_adapter(root / "adapter", [0])
    (base / "model-00001-of-00001.safetensors").rename(base / "model.safetensors")
    (base / "model.safetensors.index.json").unlink()
    return base, adapter


@pytest.fixture
def fused(pair, tmp_path) -> Path:
    """A fused checkpoint of its own for every test."""
    fuse_checkpoint(FuseRequest(pair[0], [(pair[1], 1.0)], tmp_path / "fused"))
    return tmp_path / "fused"


def rename_in_manifest(fused: Path, name: str) -> None:
    """As if somebody had put another name for the model's file into the manifest."""
    manifest = json.loads((fused / "sku_manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.safetensors")
    (fused / "sku_manifest.json").write_text(json.dumps(manifest))


LEADING_OUT = ["../outside", "{outside}", "./model.safetensors", "folder/../model.safetensors", "folder/outside", "", "."]
NO_NAMES = ["x" * 300, "a\0b", "\ud800"]


@pytest.mark.parametrize("name", LEADING_OUT + NO_NAMES)
def test_verify_opens_no_file_outside_its_directory(run_sku, fused, name):
    outside = fused.with_name("outside")
    outside.write_bytes((fused / "model.safetensors").read_bytes())  # the right bytes do not make it right
    (fused / "folder").symlink_to(fused.parent)
    rename_in_manifest(fused, name.format(outside=outside))
    done = run_sku("verify", fused)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert ("is missing" if name in NO_NAMES else "leads out of the directory") in done.stderr
    assert name.format(outside=outside) in done.stderr or not name.isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", "sku_manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_verify_opens_regular_files_only(run_sku, fused, name, kind):
    (fused / name).rename(fused.with_name("moved"))
    if kind == "fifo":
        os.mkfifo(fused / name)
    elif kind == "folder":
        (fused / name).mkdir()
    else:
        (fused / name).symlink_to({"loop": name, "device": "/dev/zero"}[kind])
    done = run_sku("verify", fused, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and name in done.stderr
    assert "is no regular file" in done.stderr


def test_verify_follows_links_to_files_as_the_hugging_face_cache_has_them(run_sku, fused):
    blobs = fused.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate([file for file in fused.iterdir() if file.is_file()]):
        blob = file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert run_sku("verify", fused).returncode == 0
    with blob.open("ab") as changed:
        changed.write(b"x")
    done = run_sku("verify", fused)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_verify_says_what_was_added_without_opening_it(run_sku, fused):
    os.mkfifo(fused / "extra.safetensors")
    (fused / "more.safetensors").symlink_to("/dev/zero")
    done = run_sku("verify", fused, timeout=60)
    assert done.returncode == 1 and "extra.safetensors was added; more.safetensors was added" in done.stderr


def test_verify_follows_a_link_to_the_directory_itself(run_sku, fused):
    fused.with_name("link").symlink_to(fused)
    assert run_sku("verify", fused.with_name("link")).returncode == 0


def test_verify_of_a_manifest_nested_without_end(run_sku, fused):
    (fused / "sku_manifest.json").write_text("[" * 100_000)
    done = run_sku("verify", fused)
    assert done.returncode == 1 and "sku_manifest.json" in done.stderr and done.stderr.count("\n") == 1
