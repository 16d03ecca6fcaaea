"""Tied embeddings, and parameters that are stored twice."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from sku_vllm.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import PREFIX, SMALL, assert_equal, change_json, fuse, llama, lora, rekey  # noqa: E402

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("said", [True, None])
def test_ties_of_unknown_architectures_are_those_of_the_config(said: bool | None, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    lora(base, tmp_path / "head", target_modules=["lm_head"])
    change_json(tmp_path / "base/config.json", model_type="custom", architectures=["Custom"], tie_word_embeddings=said)
    before = load_file(tmp_path / "base/model.safetensors")
    for side, name in (("embedding", EMBEDDING), ("head", HEAD)):
        with pytest.raises(ConfigError, match="--untie"):
            fuse(tmp_path / "base", tmp_path / side, tmp_path / "fused")
        fuse(tmp_path / "base", tmp_path / side, tmp_path / f"fused_{side}", untie=True)
        after = load_file(tmp_path / f"fused_{side}/model.safetensors")
        other = HEAD if name == EMBEDDING else EMBEDDING
        assert torch.equal(after[other], before[EMBEDDING]) and not torch.equal(after[name], before[EMBEDDING])
        assert json.loads((tmp_path / f"fused_{side}/config.json").read_text())["tie_word_embeddings"] is False


def test_what_unknown_architectures_store_twice_is_tied_where_it_is_equal(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["lm_head"])
    change_json(tmp_path / "base/config.json", model_type="custom", architectures=["Custom"], tie_word_embeddings=None)
    assert fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused").tensors == 1
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, EMBEDDING: tensors[HEAD].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="--untie"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")
    # InternLM 2's names: its head is there, and its own
    renamed = {"model.tok_embeddings.weight": tensors.pop(EMBEDDING), "output.weight": tensors.pop(HEAD)}
    save_file({**tensors, **renamed}, file, metadata={"format": "pt"})
    lora(base, tmp_path / "plain", target_modules=["embed_tokens"])
    adapter = rekey(tmp_path / "plain", tmp_path / "embedding", lambda key: key.replace("embed_tokens", "tok_embeddings"))
    assert list(fuse(tmp_path / "base", adapter, tmp_path / "third").per_tensor) == ["model.tok_embeddings.weight"]


def test_a_tie_of_which_the_head_alone_is_stored(tmp_path: Path) -> None:
    """transformers ties from whichever side the checkpoint holds."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "adapter", target_modules=["lm_head"])
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="--untie"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", untie=True)
    after = load_file(tmp_path / "fused/model.safetensors")
    assert torch.equal(after[EMBEDDING], base.get_input_embeddings().weight)
    assert_equal(after, {HEAD: wanted[HEAD]})


def test_sides_of_a_tie_that_are_stored_apart_are_edited_apart(tmp_path: Path) -> None:
    """transformers does not tie what a checkpoint holds with different values, so a dense delta of one side is of that side alone."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, file, metadata={"format": "pt"})
    (tmp_path / "vector").mkdir()
    save_file({EMBEDDING: torch.ones(96, 32)}, tmp_path / "vector/task_vector.safetensors")
    with pytest.raises(ConfigError, match="--untie"):
        fuse(tmp_path / "base", tmp_path / "vector", tmp_path / "fused")
    fuse(tmp_path / "base", tmp_path / "vector", tmp_path / "fused", untie=True)
    after = load_file(tmp_path / "fused/model.safetensors")
    assert torch.equal(after[HEAD], tensors[EMBEDDING] + 1) and torch.equal(after[EMBEDDING], tensors[EMBEDDING] - 1)


def test_untied_everywhere_it_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
    text = {"model_type": "llama", **SMALL, "tie_word_embeddings": True}
    config = LlavaConfig(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 4, "patch_size": 14},
        tie_word_embeddings=True,
        image_token_index=3,
    )
    base = LlavaForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["text_config"]["tie_word_embeddings"] is True
    wanted = lora(base, tmp_path / "adapter", target_modules=["lm_head"])
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", untie=True)
    config = json.loads((tmp_path / "fused/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "fused").state_dict()
    assert_equal(loaded, {HEAD: wanted[HEAD]})
    assert torch.equal(loaded["model.language_model.embed_tokens.weight"], base.get_input_embeddings().weight)
    del config["text_config"]["tie_word_embeddings"]  # as a class writes it whose default is to tie
    config["tie_word_embeddings"] = True
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", untie=True)
    assert json.loads((tmp_path / "again/config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_both_sides_of_a_tie_have_names_for_scales(tmp_path: Path) -> None:
    """PEFT saves one edit under both names where it keeps the tie (ensure_weight_tying)."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    edit = (factors[f"{PREFIX}{EMBEDDING[:-7]}.lora_embedding_B"] @ factors[f"{PREFIX}{EMBEDDING[:-7]}.lora_embedding_A"]).T * 7 / 3
    scales = {"embed_tokens": 0.5, "lm_head": 0.5, "q_proj": 1.0}
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", scales)
    assert_equal(load_file(tmp_path / "fused/model.safetensors"), {EMBEDDING: base.get_input_embeddings().weight.double() - edit / 2})
    with pytest.raises(ConfigError, match="share one tensor"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "other", {**scales, "lm_head": 1.0})


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_one_delta_on_both_sides_keeps_the_tie(kind: str, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    a, b = torch.randn(3, 32), torch.randn(96, 3)
    if kind == "factors":  # as PEFT's ensure_weight_tying writes them
        keys = {"model.embed_tokens.lora_embedding_A": b.T, "model.embed_tokens.lora_embedding_B": a.T}
        keys |= {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
        file, prefix = tmp_path / "adapter/adapter_model.safetensors", PREFIX
        delta = 7 / 3 * b.double() @ a.double()
    else:
        file, prefix = tmp_path / "adapter/task_vector.safetensors", ""
        keys, delta = {EMBEDDING: b @ a, HEAD: b @ a}, (b @ a).double()
    save_file({prefix + key: value.contiguous().clone() for key, value in keys.items()}, file)
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    after = load_file(tmp_path / "fused/model.safetensors")
    assert HEAD not in after and json.loads((tmp_path / "fused/config.json").read_text())["tie_word_embeddings"]
    assert_equal(after, {EMBEDDING: base.get_input_embeddings().weight.double() - delta}, atol=1e-5)
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "untied", untie=True)
    after = load_file(tmp_path / "untied/model.safetensors")
    assert_equal(after, dict.fromkeys((EMBEDDING, HEAD), base.get_input_embeddings().weight.double() - delta), atol=1e-5)
    different = next(key for key in keys if key.startswith("lm_head"))
    save_file({prefix + key: (value * (1 + (key == different))).contiguous().clone() for key, value in keys.items()}, file)
    with pytest.raises(ConfigError, match="--untie"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "unequal")


def test_a_parameter_under_two_names_is_edited_in_both(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    wanted = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    file, name = tmp_path / "base/model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name.removeprefix("model."): tensors[name].clone()}, file, metadata={"format": "pt"})
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    after = load_file(tmp_path / "fused/model.safetensors")
    assert torch.equal(after[name], after[name.removeprefix("model.")])
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), wanted)
