"""Adapters read, refused and negated; bases identified."""

import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sku_vllm.adapter.adapter import load_adapter
from sku_vllm.adapter.negation import negate_adapter
from sku_vllm.checkpoint.identity import sample_windows
from sku_vllm.checkpoint.reader import CheckpointReader, base_identity
from sku_vllm.errors import AdapterError, CheckpointError, ConfigError

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=80,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter") / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(directory)
    return directory


def make(base: Path, directory: Path, **options) -> Path:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings)).save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return make(base, tmp_path / "adapter")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2}}])
def test_adding_the_negated_adapter_subtracts_the_raw_one(base, tmp_path, options, scale):
    raw = make(base, tmp_path / "raw", **options)
    negate_adapter(raw, scale, tmp_path / "negated")
    added = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "negated")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), raw).merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain.state_dict()
    plain.load_state_dict({name: value - scale * (merged[name] - value) for name, value in before.items()})
    torch.testing.assert_close(logits(added), logits(plain), rtol=1e-4, atol=1e-5)


def test_negated_adapter_says_so_is_private_and_scales_b_alone(adapter, tmp_path):
    result = negate_adapter(adapter, 0.8, tmp_path / "negated")
    run = json.loads((tmp_path / "negated/sku_run.json").read_text())
    assert run["negated"] == {"scale": 0.8, "source_digest": load_adapter(adapter).digest} and run["schema"] == "sku.run/1"
    assert result["source_digest"] == run["negated"]["source_digest"]
    assert json.loads((tmp_path / "negated/sku_negate.json").read_text())["schema"] == "sku.negate/1"
    assert stat.S_IMODE((tmp_path / "negated").stat().st_mode) == 0o700
    raw, negated = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "negated"))
    for name, value in raw.items():
        torch.testing.assert_close(negated[name], value * (-0.8 if "lora_B" in name else 1.0), rtol=2e-7, atol=0)
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (adapter, tmp_path / "negated"))
    assert {k: v for k, v in before.items() if k != "inference_mode"} == {k: v for k, v in after.items() if k != "inference_mode"}


def test_narrow_factors_are_not_rounded_again(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    negate_adapter(adapter, 1.0, tmp_path / "one")
    negate_adapter(adapter, 0.3, tmp_path / "third")
    one, third, raw = (load_file(path / file.name) for path in (tmp_path / "one", tmp_path / "third", adapter))
    for name, value in raw.items():
        if "lora_B" in name:
            assert one[name].dtype == torch.bfloat16 and torch.equal(one[name], -value)
            assert third[name].dtype == torch.float32 and torch.allclose(third[name].double(), value.double() * -0.3, rtol=1e-7)


def test_negated_is_refused_unless_as_is(adapter, tmp_path):
    negate_adapter(adapter, 1.0, tmp_path / "negated")
    with pytest.raises(AdapterError, match="--as-is"):
        load_adapter(tmp_path / "negated")
    with pytest.raises(AdapterError, match="--as-is"):
        negate_adapter(tmp_path / "negated", 1.0, tmp_path / "again")
    assert load_adapter(tmp_path / "negated", as_is=True).negated["scale"] == 1.0


def test_dense_task_vector_is_negated_too(tmp_path):
    (tmp_path / "dense").mkdir()
    save_file({"w": torch.tensor([1.0, -2.0])}, tmp_path / "dense/task_vector.safetensors")
    negate_adapter(tmp_path / "dense", 0.5, tmp_path / "negated")
    assert load_file(tmp_path / "negated/task_vector.safetensors")["w"].tolist() == [-0.5, 1.0]
    with pytest.raises(AdapterError, match="negated"):
        load_adapter(tmp_path / "negated")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"), ({"peft_type": "IA3"}, "IA3"), ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"r": "x"}, "r and lora_alpha"), ({"r": 5}, "rank 4"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"), ({"alpha_pattern": {"*": 3}}, "no regular expression"),
        ({"target_modules": "("}, "no regular expression"), ({"target_parameters": 5}, "target_parameters"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_with_the_reason(adapter, change, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(adapter)


def test_broken_directories_are_refused_by_name(adapter, tmp_path):
    with pytest.raises(AdapterError, match="nowhere"):
        load_adapter(tmp_path / "nowhere")
    (tmp_path / "outer").mkdir()
    shutil.copytree(adapter, tmp_path / "outer/default")
    with pytest.raises(AdapterError, match="did you mean .*default"):
        load_adapter(tmp_path / "outer")
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != first}, "not pairs"),
        ({**tensors, "base_model.model.extra": torch.ones(1)}, "extra"),
        ({**tensors, first: tensors[first] * math.nan}, "NaN"),
        ({**tensors, first: tensors[first][:, :2].contiguous()}, "cannot be multiplied"),
    ):
        save_file(broken, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            load_adapter(adapter)
    experts = {f"base_model.model.model.layers.0.mlp.experts.lora_{side}.weight": torch.full((4, 4), math.nan) for side in "AB"}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), "target_parameters": ["mlp.experts.gate_up_proj"]})
    )
    save_file({**tensors, **experts}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"experts\.\S+ holds NaN"):
        load_adapter(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        load_adapter(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors"):
        load_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load_adapter(adapter)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_scales_that_are_none(adapter, tmp_path, scale):
    with pytest.raises(ConfigError, match="--scale"):
        negate_adapter(adapter, scale, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digest_follows_what_the_adapter_does_and_nothing_else(adapter, tmp_path):
    first = load_adapter(adapter).digest
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / "README.md").write_text("other")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    assert load_adapter(copy).digest == first
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    assert load_adapter(copy).digest != first


def test_identity_ignores_sharding_and_sees_names_dtypes_shapes_and_values(base, tmp_path):
    whole = base_identity(base)
    assert len(whole) == 64 and CheckpointReader(base).identity() == whole
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(CheckpointReader(tmp_path / "sharded").shards) > 2 and base_identity(tmp_path / "sharded") == whole
    tensors = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    for number, changed in enumerate(
        (
            {**tensors, name: tensors[name].half()}, {**tensors, name: tensors[name].reshape(8, 8)}, {**tensors, name: tensors[name] + 1},
            {("x" if key == name else key): value for key, value in tensors.items()},
        )
    ):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        save_file(changed, tmp_path / str(number) / "model.safetensors")
        assert base_identity(tmp_path / str(number)) != whole


def test_identity_samples_64_kib_of_a_tensor_ends_included():
    for nbytes in (0, 1, 65536, 65537, 10**6, 10**10):
        windows = sample_windows(nbytes)
        assert sum(length for _, length in windows) == min(nbytes, 65536)
        assert all(offset >= 0 and offset + length <= nbytes for offset, length in windows)
        if nbytes:
            assert windows[0][0] == 0 and sum(windows[-1]) == nbytes


def test_reader_gives_what_safetensors_gives_and_names_what_is_broken(base, tmp_path):
    reader, tensors = CheckpointReader(base), load_file(base / "model.safetensors")
    assert set(reader.names) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(reader.tensor(name), value) and torch.equal(reader.mapped(name), value)
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        reader.info("x")
    file = tmp_path / "model.safetensors"
    for data in (b"", b"\xff" * 20, (8).to_bytes(8, "little") + b"notjson!", (os.path.getsize(base / "config.json")).to_bytes(8, "little")):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            CheckpointReader(tmp_path)
