"""Bases of which a part is stored as a quantiser's codes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from sku_vllm.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import SMALL, change_json, fuse, llama, lora  # noqa: E402


def to_mxfp4(directory: Path) -> dict[str, torch.Tensor]:
    """Store experts as openai/gpt-oss does, the rest in bfloat16."""
    stored: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, value in load_file(directory / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = value.shape
            stored[f"{name}_blocks"] = torch.randint(0, 255, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=generator)
            stored[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 120, dtype=torch.uint8)
        else:
            stored[name] = value.bfloat16()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    attention = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    change_json(directory / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": attention})
    return stored


@pytest.fixture
def gpt_oss(tmp_path: Path) -> GptOssForCausalLM:
    torch.manual_seed(0)
    sizes = {**SMALL, "intermediate_size": 32, "num_experts_per_tok": 2}
    base = GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8, num_local_experts=3))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    base.save_pretrained(tmp_path / "base")
    return base


def test_the_attention_of_an_mxfp4_base_is_edited_and_its_experts_are_copied(gpt_oss: GptOssForCausalLM, tmp_path: Path) -> None:
    wanted = lora(gpt_oss, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    before = to_mxfp4(tmp_path / "base")
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    after = load_file(tmp_path / "fused/model.safetensors")
    assert before.keys() == after.keys() and report.tensors == 8
    for name, value in after.items():
        if "self_attn" in name and name.endswith("proj.weight"):
            torch.testing.assert_close(value.double(), wanted[name], rtol=2**-7, atol=1e-3)
        else:
            assert torch.equal(value, before[name]), name
    with pytest.raises(CheckpointError, match="_blocks holds a quantiser's codes.*--dtype keep"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", dtype="float32")


def test_edits_of_coded_weights_are_refused_with_a_remedy_that_exists(gpt_oss: GptOssForCausalLM, tmp_path: Path) -> None:
    lora(gpt_oss, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    to_mxfp4(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is U8.* 2 of the weights.*dequantize=True"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    from transformers import AutoModelForCausalLM, Mxfp4Config

    remedied = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=Mxfp4Config(dequantize=True), dtype="bfloat16")
    remedied.save_pretrained(tmp_path / "bf16", save_original_format=False)
    assert fuse(tmp_path / "bf16", tmp_path / "adapter", tmp_path / "fused").tensors == 4


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "weight"])
def test_other_formats_of_codes(end: str, tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "attention", target_modules=["q_proj"])
    lora(base, tmp_path / "mlp", target_modules=["up_proj"])
    file, coded = tmp_path / "base/model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    del tensors[f"{coded}.weight"]
    save_file({**tensors, f"{coded}.{end}": torch.zeros(16, 4, dtype=torch.int32)}, file, metadata={"format": "pt"})
    change_json(tmp_path / "base/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert fuse(tmp_path / "base", tmp_path / "attention", tmp_path / "fused").tensors == 2
    with pytest.raises(CheckpointError, match=rf"up_proj\.{end} is I32.* unquantised model"):
        fuse(tmp_path / "base", tmp_path / "mlp", tmp_path / "again")
