"""What lies beside the weights: an adapter's configuration, what the hub adds, and indices that list too much."""

import copy
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.errors import InputError, NegativeResult
from sku_vllm.model import load_model

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import assert_equal, fuse, llama, lora  # noqa: E402


def test_an_adapters_configuration_in_the_base_stays_behind_and_is_named(tmp_path: Path) -> None:
    """Trainers merge an adapter into the directory it lies in. With adapter_config.json there, transformers looks for its weights."""
    base = llama()
    lora(copy.deepcopy(base), tmp_path / "base", target_modules=["q_proj"])
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/rust_model.ot").write_bytes(b"the base's weights")
    wanted = lora(base, tmp_path / "adapter", seed=2, target_modules=["q_proj", "v_proj"])
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", digests=True)
    assert any("adapter_config.json" in line and "left behind" in line for line in report.warnings)
    assert not {"adapter_config.json", "adapter_model.safetensors", "rust_model.ot"} & {
        file.name for file in (tmp_path / "fused").iterdir()
    }
    assert verify_checkpoint(tmp_path / "fused")["verified"]
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)
    # transformers would add the adapter to the weights that it is merged into already
    loaded = load_model(tmp_path / "base")
    assert_equal(loaded.state_dict(), {name: value.double() for name, value in base.state_dict().items()})
    assert loaded.name_or_path == str(tmp_path / "base")


def test_a_trip_over_the_hub_is_no_change(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    fused = tmp_path / "fused"
    fuse(tmp_path / "base", tmp_path / "adapter", fused, digests=True)
    assert verify_checkpoint(fused)["aside"] == []
    (fused / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for folder in (".cache/huggingface/download", ".git/objects"):
        (fused / folder).mkdir(parents=True)
        (fused / folder / "file.metadata").write_text("x")
    assert verify_checkpoint(fused)["aside"] == [".cache", ".git", ".gitattributes"]
    (fused / "folder").mkdir()
    (fused / "folder/.hidden").write_text("x")
    with pytest.raises(NegativeResult, match=r"folder/\.hidden was added"):
        verify_checkpoint(fused)
    (fused / "folder/.hidden").unlink()
    (fused / "config.json").unlink()
    with pytest.raises(NegativeResult, match=r"config\.json is missing"):
        verify_checkpoint(fused)


def test_an_index_that_lists_more_than_the_shards_hold(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    wanted = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "base/model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.rotary_emb.inv_freq"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    for dtype in ("keep", "float32"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / dtype).state_dict(), wanted)


def test_a_clone_without_its_large_files_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    for file in (tmp_path / "adapter/adapter_model.safetensors", tmp_path / "base/model.safetensors"):
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
        with pytest.raises(InputError, match=rf"{file.name}: is a pointer of Git LFS.*git lfs pull"):
            fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
