"""Adapters whose keys are not the checkpoint's: of the text model in a multimodal checkpoint, of wrappers, of other releases."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sku_vllm.adapter.negation import negate_adapter
from sku_vllm.checkpoint.reader import CheckpointReader, base_identity
from sku_vllm.errors import AdapterError
from sku_vllm.fuse import FuseRequest, fuse_checkpoint
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import IDS, PREFIX, SMALL, assert_equal, change_json, fuse, llama, lora, rekey  # noqa: E402

VISION = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 14, "depth": 1}


def qwen() -> Any:
    text = {**SMALL, "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=VISION))


def llama4() -> Any:
    text = {**SMALL, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 128, "vision_output_dim": 32}
    vision |= {"image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize("make", [qwen, llama4])
def test_the_text_model_of_a_multimodal_checkpoint(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert type(text).__name__.endswith("ForCausalLM")
    wanted = lora(text, tmp_path / "adapter", target_modules=["q_proj", "o_proj", "lm_head"])
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).state_dict(), wanted)
    # vLLM serves the class of config.json, and leaves modules unedited that it does not find
    negate_adapter(tmp_path / "adapter", 1.0, tmp_path / "served", served_by=CheckpointReader(tmp_path / "base"))
    served = {key for key in load_file(tmp_path / "served/adapter_model.safetensors") if "lm_head" not in key}
    assert served and all(".language_model." in key for key in served)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "fused"))
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "vision" in name or "visual" in name)


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "FSDP": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "FSDP and checkpointing": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "PEFT twice": lambda key: PREFIX + key,
    "an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "no PEFT": lambda key: key.removeprefix(PREFIX),
    "no head": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "Opacus": lambda key: f"_module.{key}",
    "TRL's value head": lambda key: f"pretrained_model.{key}",
    "Lightning, compiled": lambda key: f"model._orig_mod.{key}",
    "a level more": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wraps_a_module_is_no_other_module(wrapper: str, tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "plain", target_modules=["q_proj", "down_proj"])
    adapter = rekey(tmp_path / "plain", tmp_path / "wrapped", WRAPPED[wrapper])
    fuse(tmp_path / "base", adapter, tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)
    fused, beside = (load_model(spec) for spec in (ModelSpec(tmp_path / "fused"), ModelSpec(tmp_path / "base", adapter=adapter)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():  # PEFT takes off some wrappers itself; what it does not find it would leave unedited
        torch.testing.assert_close(beside(ids).logits, fused(ids).logits, rtol=1e-5, atol=1e-6)
    plain = load_file(tmp_path / "plain/adapter_model.safetensors").keys()
    needs_base = "level" in wrapper or wrapper in ("no head", "Lightning, compiled")
    negate_adapter(adapter, 1.0, tmp_path / "served", served_by=CheckpointReader(tmp_path / "base"))
    assert load_file(tmp_path / "served/adapter_model.safetensors").keys() == plain
    if not needs_base:
        negate_adapter(adapter, 1.0, tmp_path / "negated")
        assert load_file(tmp_path / "negated/adapter_model.safetensors").keys() == plain


def test_factors_that_the_adapter_does_not_have_are_named(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "plain", target_modules=["q_proj"])
    adapter = rekey(tmp_path / "plain", tmp_path / "adapter", lambda key: key.replace("layers.1", "layers.7"))
    with pytest.raises(AdapterError, match=r"has no factors for .*layers\.1\.self_attn\.q_proj.*would stay unedited"):
        load_model(ModelSpec(tmp_path / "base", adapter=adapter))


def test_one_factor_pair_under_two_spellings_is_refused(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    save_file({**tensors, **{f"module.{key}": value * 2 for key, value in tensors.items()}}, file)
    with pytest.raises(AdapterError, match="two spellings"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    save_file({key.replace(".weight", f".{'abc'[index % 3]}.weight"): value for index, (key, value) in enumerate(tensors.items())}, file)
    with pytest.raises(AdapterError, match="adapters of several names"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    save_file({**tensors, **{key.replace(f"{PREFIX}model.", PREFIX): value * 2 for key, value in tensors.items()}}, file)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is the same weight as layers\.0\.self_attn"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.ones(32, 32), f"module.{name}": torch.ones(32, 32)}, tmp_path / "adapter/task_vector.safetensors")
    with pytest.raises(AdapterError, match="two spellings of one tensor"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")


def llava() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    text = LlamaConfig(**SMALL)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**vision)))


@pytest.mark.parametrize(
    "rename",
    [
        # 4.52 to 4.57 had a level more in the tower; 4.51 and before had the text model's own head and levels
        lambda key: key.replace("model.vision_tower.", "model.vision_tower.vision_model."),
        lambda key: key.replace("model.model.vision_tower.", "model.vision_tower.vision_model.").replace(
            "model.model.language_model.", "model.language_model.model."
        ),
    ],
)
def test_vision_towers_of_earlier_releases(rename: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llava()
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "plain", target_modules=["q_proj", "fc1"])
    adapter = rekey(tmp_path / "plain", tmp_path / "earlier", rename)
    fuse(tmp_path / "base", adapter, tmp_path / "fused")
    assert_equal(type(base).from_pretrained(tmp_path / "fused").state_dict(), wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_experts_by_themselves_as_before_transformers_5(packed: bool, tmp_path: Path) -> None:
    """The adapter of release 4 has q_proj's like and one pair of factors for each expert's projection."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "tie_word_embeddings": False}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes))
    base.save_pretrained(tmp_path / "base", **({"save_original_format": False} if packed else {}))
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    wanted = {name: value.double() for name, value in base.state_dict().items()}
    generator, factors = torch.Generator().manual_seed(2), {}
    for expert, projection, rows, columns in ((0, "up_proj", 24, 32), (2, "gate_proj", 24, 32), (1, "down_proj", 32, 24)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((3, columns), (rows, 3)))
        key = f"model.layers.1.mlp.experts.{expert}.{projection}"
        factors |= {f"{PREFIX}{key}.lora_A.weight": a, f"{PREFIX}{key}.lora_B.weight": b}
        whole = wanted[f"model.layers.1.mlp.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][expert]
        (whole[24:] if projection == "up_proj" else whole[:rows]).sub_(7 / 3 * b.double() @ a.double())
    from safetensors.torch import save_file

    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    change_json(tmp_path / "adapter/adapter_config.json", target_modules=["gate_proj", "up_proj", "down_proj"])
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)


@pytest.mark.parametrize("head", ["embed_out", "unembed_tokens"])
def test_an_output_head_under_another_name(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **IDS))
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "plain", target_modules=["lm_head", "query_key_value"])
    adapter = rekey(tmp_path / "plain", tmp_path / "adapter", lambda key: key.replace("lm_head", head))
    fuse(tmp_path / "base", adapter, tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)


def test_the_recorded_base_is_not_asked_for_again(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "plain", target_modules=["q_proj"])
    adapter = rekey(tmp_path / "plain", tmp_path / "adapter", lambda key: key.replace("q_proj", "attention_query"))
    with pytest.raises(AdapterError, match="give the base this adapter was trained on"):
        fuse(tmp_path / "base", adapter, tmp_path / "fused")
    (adapter / "sku_run.json").write_text(json.dumps({"base_identity": base_identity(tmp_path / "base")}))
    with pytest.raises(AdapterError, match="this is the base it was trained on"):
        fuse(tmp_path / "base", adapter, tmp_path / "fused")
    both = [(tmp_path / "plain", 1.0), (adapter, 1.0)]  # of which the first fits, and records no base
    with pytest.raises(AdapterError, match="this is the base it was trained on"):
        fuse_checkpoint(FuseRequest(tmp_path / "base", both, tmp_path / "fused"))
