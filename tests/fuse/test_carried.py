"""Adapters that carry more than factors: embeddings of the base, retrained or not, and buffers of LoRA variants."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from sku_vllm.adapter.negation import negate_adapter
from sku_vllm.errors import AdapterError
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import IDS, PREFIX, assert_equal, change_json, fuse, llama, lora  # noqa: E402

FAMILIES = {
    "llama": (llama, "q_proj"),
    "neox": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **IDS)
        ),
        "query_key_value",
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)), "c_attn"),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **IDS)), "query_key_value"),
    "falcon": (
        lambda: FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS)),
        "query_key_value",
    ),
}


def retrain(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value if "lora_" in key else value + 0.1 * torch.randn_like(value) for key, value in tensors.items()}, file)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bases_own_embeddings_are_no_part_of_the_edit(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, target = FAMILIES[family]
    base = make()
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "adapter", target_modules=[target], save={"save_embedding_layers": True})
    assert any("lora_" not in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)
    retrain(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="retrained copy"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16])
def test_embeddings_rounded_by_training_are_still_the_bases(stored: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    llama().to(stored).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded)
    lora(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    copied = load_file(tmp_path / "adapter/adapter_model.safetensors")[f"{PREFIX}lm_head.base_layer.weight"]
    assert copied.dtype == loaded
    assert fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused").tensors == 3
    retrain(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"lm_head\.weight.* retrained copy"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")


def test_beside_the_base_copies_change_nothing_and_retrained_ones_are_refused(tmp_path: Path) -> None:
    """PEFT puts into the model whatever whole tensors an adapter holds."""
    llama().save_pretrained(tmp_path / "base")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    lora(rounded, tmp_path / "adapter", target_modules=["q_proj"], save={"save_embedding_layers": True})
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    fused, beside = load_model(tmp_path / "fused"), load_model(ModelSpec(tmp_path / "base", adapter=tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(beside(ids).logits, fused(ids).logits, rtol=1e-5, atol=1e-6)
    retrain(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"lm_head\.weight.*retrained copy.*cannot be subtracted"):
        load_model(ModelSpec(tmp_path / "base", adapter=tmp_path / "adapter"))


def test_negate_refuses_what_fuse_refuses(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"], save={"save_embedding_layers": True})
    with pytest.raises(AdapterError, match=r"lm_head\.weight, model\.embed_tokens\.weight.*--model"):
        negate_adapter(tmp_path / "adapter", 1.0, tmp_path / "negated")
    negate_adapter(tmp_path / "adapter", 1.0, tmp_path / "negated", model=tmp_path / "base")
    assert all("lora_" in key for key in load_file(tmp_path / "negated/adapter_model.safetensors"))
    retrain(tmp_path / "adapter")
    change_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match=r"lm_head\.weight.*retrained copy.*embed_tokens\.weight.*not be base − adapter"):
        negate_adapter(tmp_path / "adapter", 1.0, tmp_path / "retrained")
    assert not list(tmp_path.glob("retrained*"))


def test_the_buffers_of_velora_are_for_training_alone(tmp_path: Path) -> None:
    from peft.tuners.lora import VeloraConfig

    base = llama()
    base.save_pretrained(tmp_path / "base")
    wanted: Any = lora(base, tmp_path / "adapter", target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
    assert any("velora" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)
