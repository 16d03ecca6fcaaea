"""What is wrong is named: the index and not the adapter, the adapter's own form, and an edit that is nothing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from sku_vllm.errors import AdapterError, CheckpointError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import IDS, PREFIX, SMALL, assert_equal, change_json, fuse, llama, lora  # noqa: E402

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A base in five shards and an adapter; the wanted weights."""
    base = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return lora(base, tmp_path / "adapter", target_modules=["q_proj"])


def map_of(base: Path, change: Any) -> None:
    """Change the weight_map of the index."""
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))


@pytest.mark.parametrize("lost", [Q, "model.layers.1.mlp.down_proj.weight"])
def test_an_index_without_one_of_the_shards(lost: str, pair: Any, tmp_path: Path) -> None:
    """Also where the edit lies elsewhere: transformers would fill what is missing with random numbers."""
    base = tmp_path / "base"
    map_of(base, lambda names: {name: file for name, file in names.items() if file != names[lost]})
    with pytest.raises(CheckpointError, match=r"index\.json: lists 4 of 5 shards, and model\.\S+ is in none of them; download"):
        fuse(base, tmp_path / "adapter", tmp_path / "fused")
    change_json(base / "config.json", model_type="unheard_of", architectures=["Unheard"])
    with pytest.raises(CheckpointError, match="lists 4 of 5 shards; download"):
        fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert not list(tmp_path.glob("fused*"))


def test_a_shard_that_holds_nothing_of_the_model_may_be_left_out(pair: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for file in base.glob("model-*.safetensors"):
        file.rename(base / file.name.replace("-of-00005", "-of-00006"))
    map_of(base, lambda names: {name: file.replace("-of-00005", "-of-00006") for name, file in names.items()})
    fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict(), pair)


@pytest.mark.parametrize("folder", ["weights/", "../", "/nowhere/"])
def test_shards_in_another_folder_are_not_called_missing(folder: str, pair: Any, tmp_path: Path) -> None:
    map_of(tmp_path / "base", lambda names: {name: folder + file for name, file in names.items()})
    with pytest.raises(CheckpointError, match=rf"names {folder}model-00001-of-00005\.safetensors, which lies in another folder; put"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")


def test_weights_without_what_lies_beside_them_are_no_model(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    report = fuse(tmp_path / "base/model.safetensors", tmp_path / "adapter", tmp_path / "fused")
    assert any("is one file: config.json and tokenizer beside it are not copied" in line for line in report.warnings)
    assert fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole").warnings == []


def test_an_adapter_that_was_never_trained_is_named(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert report.retained is None and any("the edit is zero everywhere, so this is the base again" in line for line in report.warnings)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("adapter_config.json", {"target_modules": 5, "target_parameters": ["x"]}, "target_modules must be a list of names"),
        ("adapter_config.json", {"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA.*; train one"),
        ("sku_run.json", {"base_identity": 5}, "'base_identity' must be a string; copy the adapter again"),
    ],
)
def test_what_an_adapter_says_of_itself_may_be_anything(file: str, change: Any, says: str, pair: Any, tmp_path: Path) -> None:
    if not (tmp_path / "adapter" / file).exists():
        (tmp_path / "adapter" / file).write_text("{}")
    change_json(tmp_path / "adapter" / file, **change)
    with pytest.raises(AdapterError, match=says):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", any_base=False)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("use_dora", r"lora_magnitude_vector\S*; DoRA rescales.*train with use_dora=False"),
        ("lora_bias", r"lora_B\.bias\S*; a LoRA bias.*train with lora_bias=False"),
    ],
)
def test_tensors_of_a_variant_name_it_though_the_configuration_does_not(option: str, says: str, tmp_path: Path) -> None:
    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {option: True}
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "adapter")
    change_json(tmp_path / "adapter/adapter_config.json", **{option: False})
    with pytest.raises(AdapterError, match=says):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")


def test_factors_of_a_convolution_are_called_that(tmp_path: Path) -> None:
    sizes = {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in (("layers", 1), ("attention_heads", 4))}
    base = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=96, d_model=32, num_mel_bins=8, decoder_start_token_id=1, **sizes, **IDS)
    )
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=3, target_modules=["conv1", "q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"conv1\.lora_A\.weight \[3, 8, 3\] is a factor of a convolution.*target linear layers"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")


def test_adapters_one_level_below_are_all_named(pair: Any, tmp_path: Path) -> None:
    """The first name is not the last checkpoint: checkpoint-1000 comes before checkpoint-200."""
    for name in ("checkpoint-200", "checkpoint-1000"):
        shutil.copytree(tmp_path / "adapter", tmp_path / "run" / name)
    with pytest.raises(AdapterError, match=r"give one of those below it: \S+checkpoint-1000, \S+checkpoint-200$"):
        fuse(tmp_path / "base", tmp_path / "run", tmp_path / "fused")
    shutil.rmtree(tmp_path / "run/checkpoint-200")
    with pytest.raises(AdapterError, match=r"did you mean \S+checkpoint-1000\?$"):
        fuse(tmp_path / "base", tmp_path / "run", tmp_path / "fused")


def test_a_retrained_tensor_beside_the_factors_is_no_reason_to_load_it_again(pair: Any, tmp_path: Path) -> None:
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({**load_file(file), f"{PREFIX}model.norm.weight": torch.full((SMALL["hidden_size"],), 2.0)}, file)
    says = r"^1 whole tensors do not fit.*model\.norm\.weight: the adapter brings a retrained copy.*or train without retraining them$"
    with pytest.raises(AdapterError, match=says):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
