"""`--dtype`: what stays in float32, the places in config.json that name a dtype, and tensors without elements."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import SMALL, change_json, fuse, llama, lora  # noqa: E402


def deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {**SMALL, "num_key_value_heads": 4, "first_k_dense_replace": 0, "n_shared_experts": 1}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **experts, **heads))
    for name, buffer in base.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(6.94 + 0.004 * torch.randn(buffer.shape))
    return base


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_the_biases_that_choose_experts_stay_in_float32(stored: torch.dtype, known: bool, tmp_path: Path) -> None:
    model = deepseek()
    model.save_pretrained(tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=stored)
    base.save_pretrained(tmp_path / "base")
    lora(model, tmp_path / "adapter", target_modules=["q_a_proj"])
    if not known:  # as a checkpoint with code of its own
        change_json(tmp_path / "base/config.json", model_type="deepseek_custom", architectures=["CustomForCausalLM"])
    for dtype in ("bfloat16", "float16"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / dtype, 0.01, dtype=dtype)
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", dtype))
        kept = {name for name, value in after.items() if value.dtype == torch.float32}
        assert kept == {name for name in before if name.endswith("e_score_correction_bias")} and kept
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert all(value.dtype == getattr(torch, dtype) for name, value in after.items() if name not in kept)


def test_every_place_that_names_a_dtype_says_the_new_one(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    decoder = {"model_type": "llama", "dtype": "float32"}  # as MusicGen calls a section
    nested = {"dtype": "float32", "torch_dtype": None, "deeper_config": {"torch_dtype": "float32"}, "mamba_ssm_dtype": "float32"}
    quantised = {"quant_method": None, "dtype": "float32"}
    change_json(
        tmp_path / "base/config.json",
        model_type="custom",
        torch_dtype="float32",
        text_config=nested,
        quantization_config=quantised,
        decoder=decoder,
    )
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", dtype="bfloat16")
    config = json.loads((tmp_path / "fused/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["text_config"] == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "deeper_config": {"torch_dtype": "bfloat16"},
        "mamba_ssm_dtype": "float32",
    }
    assert config["quantization_config"] == quantised and config["decoder"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("shape", [(5, 0), (0,), (0, 4)])
def test_tensors_without_elements_are_cast_and_copied(shape: tuple[int, ...], tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "base/model.safetensors"
    save_file({**load_file(file), "empty": torch.empty(shape)}, file, metadata={"format": "pt"})
    for dtype, stored in (("keep", torch.float32), ("bfloat16", torch.bfloat16)):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        empty = load_file(tmp_path / dtype / "model.safetensors")["empty"]
        assert empty.shape == shape and empty.dtype == stored
