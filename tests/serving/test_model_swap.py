"""The worker's side of a swap in process: the same tensors as a fuse, and what must be refused before anything is paused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sku_vllm.errors import AdapterError, CheckpointError, ConfigError
from sku_vllm.serving.arm_adapter import served_rank, write_arm_adapter
from sku_vllm.serving.arms import Arm
from sku_vllm.serving.worker_extension import check_source, weights


@pytest.mark.parametrize("at_once", [1, 2**16, 2**26])
def test_a_swap_yields_what_fuse_writes_bit_for_bit(tiny, tmp_path, monkeypatch, at_once):
    """Tensor by tensor, several together, and all at once."""
    monkeypatch.setattr("sku_vllm.serving.worker_extension.AT_ONCE", at_once)
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest

    fuse_checkpoint(FuseRequest(tiny / "base", [(tiny / "adapter", 0.7)], tmp_path / "fused"))
    fused, base = load_file(tmp_path / "fused/model.safetensors"), load_file(tiny / "base/model.safetensors")
    swapped = dict(weights(str(tiny / "base"), {"adapter": str(tiny / "adapter"), "scale": 0.7}))
    assert set(swapped) == set(base) == set(fused)
    assert all(torch.equal(swapped[name], fused[name]) for name in base)
    assert sum(not torch.equal(swapped[name], base[name]) for name in base) == 14
    restored = dict(weights(str(tiny / "base"), None))
    assert all(torch.equal(restored[name], base[name]) for name in base)


def test_a_checkpoint_that_is_no_edit_of_the_base_is_refused(tiny, tmp_path):
    tensors = load_file(tiny / "base/model.safetensors")
    shutil.copytree(tiny / "base", tmp_path / "part")
    lost = tensors.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(tensors, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="k_proj"):  # q and v without k would be silent garbage
        check_source(str(tiny / "base"), {"checkpoint": str(tmp_path / "part")}, on_cpu=True)
    save_file(
        {**tensors, "model.layers.0.self_attn.k_proj.weight": lost[:, :64].contiguous()},
        tmp_path / "part/model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="k_proj"):
        check_source(str(tiny / "base"), {"checkpoint": str(tmp_path / "part")}, on_cpu=True)


def test_tied_embeddings_on_cpu_are_refused_where_the_edit_touches_them(tiny, tmp_path):
    import json

    shutil.copytree(tiny / "base", tmp_path / "tied")
    tensors = load_file(tiny / "base/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "tied/config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    shutil.copytree(tmp_path / "tied", tmp_path / "other")
    source, tied = {"checkpoint": str(tmp_path / "other")}, str(tmp_path / "tied")
    assert check_source(tied, source, on_cpu=True) == len(tensors)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="ties its embeddings"):
        check_source(tied, source, on_cpu=True)
    assert check_source(tied, source, on_cpu=False) == len(tensors)


def test_quantised_bases_take_no_edit(tiny, tmp_path):
    import json

    shutil.copytree(tiny / "base", tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised/config.json").read_text())
    (tmp_path / "quantised/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ConfigError, match="quantised"):
        check_source(str(tmp_path / "quantised"), {"adapter": str(tiny / "adapter"), "scale": 1.0}, on_cpu=True)


def test_negations_are_written_once_and_privately(tiny, tmp_path):
    arm = Arm("negated", "lora", str(tiny / "adapter"), 0.7)
    first = write_arm_adapter(arm, str(tiny / "base"), tmp_path / "adapters")
    stamp = (first.path / "adapter_model.safetensors").stat().st_mtime_ns
    assert write_arm_adapter(arm, str(tiny / "base"), tmp_path / "adapters") == first
    assert (first.path / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert first.path.stat().st_mode & 0o777 == (tmp_path / "adapters").stat().st_mode & 0o777 == 0o700
    assert first.rank == 8 and served_rank([8, 33]) == 64 and served_rank([96]) == 128
    raw, negated = load_file(tiny / "adapter/adapter_model.safetensors"), load_file(first.path / "adapter_model.safetensors")
    for name in raw:
        torch.testing.assert_close(negated[name], raw[name] * (-0.7 if "lora_B" in name else 1), rtol=1e-6, atol=0)


def test_adapters_that_cannot_be_arms_are_refused(tiny, tmp_path):
    once = write_arm_adapter(Arm("negated", "lora", str(tiny / "adapter"), 1.0), str(tiny / "base"), tmp_path / "adapters")
    with pytest.raises(AdapterError, match="already negated"):
        write_arm_adapter(Arm("negated", "lora", str(once.path), 1.0), str(tiny / "base"), tmp_path / "adapters")
    tensors = {
        name: tensor[:, :64].contiguous() if "lora_A" in name else tensor
        for name, tensor in load_file(tiny / "adapter/adapter_model.safetensors").items()
    }
    shutil.copytree(tiny / "adapter", tmp_path / "narrow")
    save_file(tensors, tmp_path / "narrow/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="--arm narrow.*q_proj"):
        write_arm_adapter(Arm("narrow", "lora", str(tmp_path / "narrow"), 1.0), str(tiny / "base"), tmp_path / "adapters")
