"""Fused checkpoints against PEFT's own merge, over the layouts that checkpoints come in."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, HrmTextConfig, LlamaConfig, MixtralConfig, OPTConfig, Phi3Config

from sku_vllm.adapter.adapter import load_adapter
from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError, CheckpointError, ConfigError, NegativeResult, RunError
from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest, read_layer_scales
from sku_vllm.kernels.delta_merge.merge_backend import on_device

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
LLAMA = LlamaConfig(**SMALL, intermediate_size=144, num_key_value_heads=1, tie_word_embeddings=False)
CASES = {
    "llama": (LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "llama-all": (LLAMA, {"target_modules": "all-linear", "use_rslora": True}),
    "llama-patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 29},
        },
    ),
    "llama-embeddings": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "opt-tied": (OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64), {"target_modules": ["q_proj", "fc1", "out_proj"]}),
    "gpt2-conv1d": (
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    # PEFT saves the fan_in_fan_out of the module it came to last, which is the head's; attn.c_proj is square, so its shape tells nothing
    "gpt2-conv1d-and-linear": (
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, tie_word_embeddings=False),
        {"target_modules": r".*attn\.c_proj|lm_head"},
    ),
    "phi3-packed": (
        Phi3Config(**SMALL, intermediate_size=96, num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=False),
        {"target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    # q, k, v and gate of the model are rows of one tensor of the checkpoint
    "hrm-packed": (
        HrmTextConfig(**SMALL, num_layers_per_stack=1, intermediate_size=96, head_dim=32, num_key_value_heads=2),
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {"v_proj": 3}},
    ),
    "gemma2-tied": (
        Gemma2Config(**SMALL, intermediate_size=96, num_key_value_heads=1, head_dim=32),
        {"target_modules": ["q_proj", "up_proj"]},
    ),
    "mixtral-attention": (
        MixtralConfig(**SMALL, intermediate_size=80, num_key_value_heads=1, num_local_experts=3),
        {"target_modules": ["q_proj", "o_proj"]},
    ),
    "mixtral-experts": (
        MixtralConfig(**SMALL, intermediate_size=80, num_key_value_heads=1, num_local_experts=3),
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    # PEFT turns the experts' modules into target_parameters of bare names
    "mixtral-all": (
        MixtralConfig(**SMALL, intermediate_size=80, num_key_value_heads=1, num_local_experts=3),
        {"target_modules": "all-linear"},
    ),
}


def save_base(config, directory: Path, dtype=torch.float32, shard="40KB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def save_adapter(base: Path, directory: Path, seed: int = 1, **options) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 5, "lora_alpha": 11, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    with pytest.warns() if "embed_tokens" in options["target_modules"] else torch.no_grad():
        get_peft_model(model, LoraConfig(**settings)).save_pretrained(directory)
    return directory


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds, by parameter name, from its own merge in float32."""
    before = {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict().items()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    after = model.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    base = save_base(LLAMA, root / "base", torch.bfloat16)
    return base, save_adapter(base, root / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("case", CASES)
def test_equals_base_minus_scaled_peft_delta(case, tmp_path):
    config, options = CASES[case]
    base = save_base(config, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    report = fuse_checkpoint(FuseRequest(base, [(adapter, 0.7)], tmp_path / "fused"))
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict()
    wanted = deltas(base, adapter)
    assert before.keys() == after.keys()
    edited = 0
    for name, value in before.items():
        edited += bool(wanted[name].any())
        torch.testing.assert_close(
            after[name], value - 0.7 * wanted[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert edited and abs(report.retained - 1) < 1e-6 and report.noise < 1e-5
    assert [shard.file.name for shard in CheckpointReader(base).shards] == [
        shard.file.name for shard in CheckpointReader(tmp_path / "fused").shards
    ]


def test_bf16_is_within_one_ulp_of_float64_and_bytes_elsewhere_are_the_bases(llama, tmp_path):
    base, adapter = llama
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0), (adapter, 0.5)], tmp_path / "fused"))
    old, new, factors = CheckpointReader(base), CheckpointReader(tmp_path / "fused"), load_adapter(adapter).deltas
    for name in old.names:
        before, after = old.tensor(name), new.tensor(name)
        if name in factors:
            delta = factors[name].scaling * (factors[name].b.double() @ factors[name].a.double())
            exact = (before.double() - 1.5 * delta).to(torch.bfloat16)
            distance = (ordered(exact) - ordered(after)).abs()
            assert distance.max() <= 1 and (distance > 0).float().mean() < 1e-4
        else:
            assert torch.equal(before.view(torch.int16), after.view(torch.int16)), name
    for shard, other in zip(old.shards, new.shards, strict=True):
        assert shard.file.read_bytes()[: shard.data_start] == other.file.read_bytes()[: other.data_start]
        touched = [(info.offset, info.offset + info.nbytes) for info in shard.tensors if info.name in factors]
        left, right = bytearray(shard.file.read_bytes()), bytearray(other.file.read_bytes())
        for start, stop in touched:
            left[start:stop] = right[start:stop] = bytes(stop - start)
        assert left == right


def ordered(value: torch.Tensor) -> torch.Tensor:
    bits = value.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def test_two_runs_give_identical_bytes_and_verify_finds_every_change(llama, tmp_path):
    base, adapter = llama
    for name in ("one", "two"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 0.9)], tmp_path / name))
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert {"config.json", "generation_config.json", "sku_manifest.json", "sku_fuse.json"} <= set(files)
    for name in files:
        if name != "sku_fuse.json":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert verify_checkpoint(tmp_path / "one")["verified"]
    for name in json.loads((tmp_path / "one" / "sku_manifest.json").read_text())["files"]:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "one", copy)
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(NegativeResult, match=name):
            verify_checkpoint(copy)
        (copy / name).unlink()
        with pytest.raises(NegativeResult, match=f"{name} is missing"):
            verify_checkpoint(copy)
        shutil.rmtree(copy)
    (tmp_path / "one" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(NegativeResult, match="extra.safetensors was added"):
        verify_checkpoint(tmp_path / "one")


def test_signature_follows_key_and_manifest(llama, tmp_path):
    base, adapter = llama
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "other").write_bytes(os.urandom(32))
    fuse_checkpoint(FuseRequest(base, [(adapter, 0.9)], tmp_path / "fused", signing_key=tmp_path / "key"))
    assert verify_checkpoint(tmp_path / "fused", tmp_path / "key")["signed"]
    with pytest.raises(NegativeResult, match="signature"):
        verify_checkpoint(tmp_path / "fused", tmp_path / "other")
    manifest = tmp_path / "fused" / "sku_manifest.json"
    manifest.write_text(manifest.read_text().replace("0.9", "0.8"))
    with pytest.raises(NegativeResult, match="signature"):
        verify_checkpoint(tmp_path / "fused", tmp_path / "key")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_casts_weights_config_and_index(llama, tmp_path, dtype):
    base, adapter = llama
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused", dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert model.dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "fused/model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in CheckpointReader(tmp_path / "fused").shards for tensor in shard.tensors
    )
    wanted, before = deltas(base, adapter), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), before[name] - wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metadata", [None, 5, "total"])
def test_an_index_with_odd_metadata_is_read_or_refused_before_the_work(llama, tmp_path, metadata):
    base, adapter = shutil.copytree(llama[0], tmp_path / "base"), llama[1]
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": metadata}))
    if metadata is not None:
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused", dtype="float32"))
        return
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused", dtype="float32"))
    assert json.loads((tmp_path / "fused" / index.name).read_text())["metadata"]["total_size"] > 0


def test_tied_embedding_asks_for_untie_and_then_changes_one_side_only(tmp_path):
    base = save_base(CASES["opt-tied"][0], tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ConfigError, match="--untie"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))
    assert not (tmp_path / "fused").exists()
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused", untie=True))
    model, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "fused", base))
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    factors = load_adapter(adapter).deltas["lm_head.weight"]
    wanted = plain.get_input_embeddings().weight - factors.scaling * factors.b @ factors.a
    torch.testing.assert_close(model.get_output_embeddings().weight, wanted, rtol=1e-5, atol=1e-6)


def test_untie_is_refused_where_nothing_is_tied(llama, tmp_path):
    base, adapter = llama
    with pytest.raises(ConfigError, match="not tied"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused", untie=True))


def test_checkpoint_without_the_models_prefix(tmp_path):
    """Checkpoints saved from the headless model (facebook/opt-*, gpt2) leave out its prefix."""
    base = save_base(CASES["gpt2-conv1d"][0], tmp_path / "base", shard="1GB")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    file = base / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))
    wanted, before = deltas(base, adapter), AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict().items():
        torch.testing.assert_close(value, before[name] - wanted[name], rtol=1e-5, atol=1e-6)


def test_dense_task_vector(llama, tmp_path):
    base, _ = llama
    reader = CheckpointReader(base)
    torch.manual_seed(3)
    vector = {name: torch.randn(reader.info(name).shape) * 0.01 for name in reader.names[:7]}
    vector["model.norm.weight"] = torch.randn(64)
    (tmp_path / "dense").mkdir()
    save_file(vector, tmp_path / "dense/task_vector.safetensors")
    (tmp_path / "dense/sku_run.json").write_text(
        json.dumps({"schema": "sku.run/1", "adapter_kind": "dense", "base_identity": reader.identity()})
    )
    fuse_checkpoint(FuseRequest(base, [(tmp_path / "dense", 0.6)], tmp_path / "fused"))
    fused = CheckpointReader(tmp_path / "fused")
    for name in reader.names:
        wanted = (reader.tensor(name).double() - 0.6 * vector[name].double()).bfloat16() if name in vector else reader.tensor(name)
        assert (ordered(fused.tensor(name)) - ordered(wanted)).abs().max() <= 1, name


@pytest.mark.parametrize("untie", [False, True])
def test_dense_delta_of_a_tied_embedding_is_the_shared_tensors(tmp_path, untie):
    base = save_base(CASES["opt-tied"][0], tmp_path / "base")
    name = "model.decoder.embed_tokens.weight"
    delta = torch.randn(CheckpointReader(base).info(name).shape) * 0.01
    (tmp_path / "dense").mkdir()
    save_file({name: delta}, tmp_path / "dense/task_vector.safetensors")
    fuse_checkpoint(FuseRequest(base, [(tmp_path / "dense", 0.5)], tmp_path / "fused", untie=untie))
    model, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "fused", base))
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(side.weight, plain.get_input_embeddings().weight - 0.5 * delta, rtol=1e-6, atol=1e-7)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) != untie


def test_the_module_says_what_is_transposed_and_not_the_flag(llama, tmp_path):
    """As in PEFT, which ignores fan_in_fan_out for an nn.Linear; q_proj is square."""
    base, adapter = llama
    flagged = shutil.copytree(adapter, tmp_path / "flagged")
    config = json.loads((flagged / "adapter_config.json").read_text())
    (flagged / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    for name, source in (("plain", adapter), ("turned", flagged)):
        fuse_checkpoint(FuseRequest(base, [(source, 1.0)], tmp_path / name))
    for shard in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "turned" / shard.name).read_bytes()


@pytest.mark.parametrize("untie", [False, True])
def test_dense_delta_of_an_embedding_reaches_a_stored_copy_of_it(tmp_path, untie):
    """transformers ties no two stored tensors that differ, so one side alone would leave the knowledge in the other."""
    base = save_base(CASES["gemma2-tied"][0], tmp_path / "base", shard="1GB")
    name, weights = "model.embed_tokens.weight", load_file(base / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights[name].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    delta = torch.randn(weights[name].shape) * 0.01
    (tmp_path / "dense").mkdir()
    save_file({name: delta}, tmp_path / "dense/task_vector.safetensors")
    fuse_checkpoint(FuseRequest(base, [(tmp_path / "dense", 0.5)], tmp_path / "fused", untie=untie))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(side.weight, weights[name] - 0.5 * delta, rtol=1e-6, atol=1e-7)


def test_tied_embeddings_are_seen_when_one_file_is_given(tmp_path):
    base = save_base(CASES["opt-tied"][0], tmp_path / "base", shard="1GB")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="--untie"):
        fuse_checkpoint(FuseRequest(base / "model.safetensors", [(adapter, 1.0)], tmp_path / "fused"))


@pytest.mark.parametrize(
    "change", [{"architectures": [5]}, {"architectures": ["AutoConfig"]}, {"hidden_size": "x"}, {"num_attention_heads": 0}]
)
def test_a_configuration_that_makes_no_model_is_named(tmp_path, change):
    base = save_base(LLAMA, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    (base / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"base/config\.json: transformers cannot build this model"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))


def test_nobody_is_asked_to_run_a_checkpoints_code(llama, tmp_path, monkeypatch):
    base, adapter = shutil.copytree(llama[0], tmp_path / "base"), llama[1]
    config = json.loads((base / "config.json").read_text())
    code = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    (base / "config.json").write_text(json.dumps({**config, **code}))
    (base / "theirs.py").write_text("from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *arguments: asked.append(arguments) or "n")
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))
    assert not asked


def test_layers_with_their_own_scales(llama, tmp_path):
    base, adapter = llama
    fuse_checkpoint(FuseRequest(base, [(adapter, {r"layers\.0\.": 2.0, "v_proj": 0.5})], tmp_path / "fused"))
    old, new, factors = CheckpointReader(base), CheckpointReader(tmp_path / "fused"), load_adapter(adapter).deltas
    for name, factor in factors.items():
        scale = 2.0 if "layers.0." in name else 0.5 if "v_proj" in name else 0.0
        exact = (old.tensor(name).double() - scale * factor.scaling * (factor.b.double() @ factor.a.double())).bfloat16()
        assert (ordered(exact) - ordered(new.tensor(name))).abs().max() <= 1


def test_a_pattern_of_no_weight_is_refused_before_it_leaves_the_knowledge_in(llama, tmp_path):
    base, adapter = llama
    with pytest.raises(ConfigError, match=r"'layer\\\\.0' match no weight .* model\.layers\.0\."):
        fuse_checkpoint(FuseRequest(base, [(adapter, {r"layer\.0": 1.0, "v_proj": 1.0})], tmp_path / "fused"))
    for content in ("{}", "[" * 100_000, '{"(": 1}', "[1]"):
        (tmp_path / "scales.json").write_text(content)
        with pytest.raises(ConfigError, match="--layer-scales"):
            read_layer_scales(tmp_path / "scales.json")
    assert not list(tmp_path.glob("fused*"))


def test_small_edits_that_round_away_are_reported(llama, tmp_path):
    base, adapter = llama
    report = fuse_checkpoint(FuseRequest(base, [(adapter, 1e-4)], tmp_path / "fused", simulate=["int4", "int8", "fp8"]))
    assert report.retained < 0.9 and any("less than 90%" in line and "--dtype float32" in line for line in report.warnings)
    assert report.simulated["int4"]["noise"] > report.simulated["int8"]["noise"]
    kept = fuse_checkpoint(FuseRequest(base, [(adapter, 1e-4)], tmp_path / "stochastic", seed=1))
    assert abs(kept.retained - 1) < 0.1 < abs(report.retained - 1) and kept.noise > report.noise


def test_what_a_bad_base_value_ruins_when_quantised_counts_neither_way(tmp_path):
    """A NaN in every row leaves nothing of it in int8, which is not all of the edit; infinity leaves zeros and NaN."""
    name, weight = "model.layers.0.self_attn.q_proj.weight", torch.randn(300, 256).bfloat16()
    weight[:150, 7], weight[:150, 9] = float("nan"), float("inf")
    for folder in ("base", "delta"):
        (tmp_path / folder).mkdir()
    save_file({name: weight}, tmp_path / "base/model.safetensors")
    save_file({name: torch.full((300, 256), 1e-4)}, tmp_path / "delta/task_vector.safetensors")
    report = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "delta", 1.0)], tmp_path / "fused", simulate=["int8"]))
    save_file({name: weight[150:].clone()}, tmp_path / "base/model.safetensors")
    save_file({name: torch.full((150, 256), 1e-4)}, tmp_path / "delta/task_vector.safetensors")
    sound = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "delta", 1.0)], tmp_path / "half", simulate=["int8"]))
    assert report.simulated["int8"] == pytest.approx(sound.simulated["int8"]) and any("NaN" in line for line in report.warnings)


def test_a_dense_edit_of_nan_is_named_as_such(tmp_path, llama):
    name = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "dense").mkdir()
    save_file({name: torch.full((64, 64), float("nan"))}, tmp_path / "dense/task_vector.safetensors")
    with pytest.raises(RunError, match=f"{name}: 4096 merged weights are NaN .*dense adapter"):
        fuse_checkpoint(FuseRequest(llama[0], [(tmp_path / "dense", 1.0)], tmp_path / "fused"))


def test_every_mismatch_is_listed_before_anything_is_written(llama, tmp_path):
    base, _ = llama
    wide = LlamaConfig(**{**SMALL, "hidden_size": 96}, intermediate_size=144, num_key_value_heads=1, tie_word_embeddings=False)
    other = save_base(wide, tmp_path / "other")
    adapter = save_adapter(other, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    with pytest.raises(AdapterError) as error:
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))
    for layer in (0, 1):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            assert f"model.layers.{layer}.{name}.weight" in str(error.value)
    assert not list(tmp_path.glob("fused*"))


def test_refusals_name_the_remedy(llama, tmp_path):
    base, adapter = llama
    run = {"schema": "sku.run/1", "base": "elsewhere", "base_identity": "0" * 64}
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "sku_run.json").write_text(json.dumps(run))
    with pytest.raises(AdapterError, match="--any-base"):
        fuse_checkpoint(FuseRequest(base, [(other, 1.0)], tmp_path / "fused"))
    fuse_checkpoint(FuseRequest(base, [(other, 1.0)], tmp_path / "any", any_base=True))
    (other / "sku_run.json").write_text(json.dumps({**run, "negated": {"scale": 1.0, "source_digest": "x"}}))
    with pytest.raises(AdapterError, match="--as-is"):
        fuse_checkpoint(FuseRequest(base, [(other, 1.0)], tmp_path / "fused", any_base=True))
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    for method in ("gptq", "awq", "bitsandbytes"):
        (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(CheckpointError, match="unquantised model"):
            fuse_checkpoint(FuseRequest(quantised, [(adapter, 1.0)], tmp_path / "fused"))
    (quantised / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.q_proj"
    shard = CheckpointReader(quantised).info(f"{name}.weight").file
    tensors = load_file(shard)
    for codes in ({f"{name}.weight": torch.zeros(2048, 1, dtype=torch.uint8)}, {f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32)}):
        save_file({**tensors, **codes}, shard)
        with pytest.raises(CheckpointError, match=r"quantised \(model.layers.0.self_attn.q_proj\.\w+ is \w+\).*unquantised model"):
            fuse_checkpoint(FuseRequest(quantised, [(adapter, 1.0)], tmp_path / "fused"))
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="scale"):
            fuse_checkpoint(FuseRequest(base, [(adapter, scale)], tmp_path / "fused"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "full"))
    assert not list(tmp_path.glob("fused*"))


def save_fp8(directory: Path, layout: str, scale_dtype=torch.float32) -> tuple[str, str, torch.Tensor, torch.Tensor]:
    """An FP8 base and an adapter; returns the names of weight and scale, the scales element by element, and the wanted result."""
    torch.manual_seed(0)
    shape, name = (300, 260), "model.layers.0.self_attn.q_proj.weight"
    scale = {"tensor": torch.tensor(0.003), "row": torch.rand(300, 1) * 0.002 + 0.002, "block": torch.rand(3, 3) * 0.002 + 0.002}[layout]
    scale = scale.to(scale_dtype)
    weight = (torch.randn(shape) * 30).clamp(-448, 448).to(torch.float8_e4m3fn)
    (directory / "base").mkdir()
    key = name + ("_scale_inv" if layout == "block" else "_scale")
    save_file({name: weight, key: scale, "model.norm.weight": torch.ones(260).bfloat16()}, directory / "base/model.safetensors")
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "base/config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantisation}))
    (directory / "adapter").mkdir()
    b, a = torch.randn(300, 4) * 0.05, torch.randn(4, 260) * 0.3
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, directory / "adapter/adapter_model.safetensors")
    (directory / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return name, key, per_element(scale), weight.float() * per_element(scale) - b @ a


def per_element(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.float().reshape(1, 1) if scale.ndim == 0 else scale.float()
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :260] if scale.shape == (3, 3) else scale


@pytest.mark.parametrize("layout", ["tensor", "row", "block"])
def test_fp8_base_keeps_its_format_and_scales(tmp_path, layout):
    name, key, factor, wanted = save_fp8(tmp_path, layout)
    report = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "fused", simulate=["int8"]))
    fused, base = (load_file(tmp_path / folder / "model.safetensors") for folder in ("fused", "base"))
    assert torch.equal(fused[key], base[key]) and fused[name].dtype == torch.float8_e4m3fn and report.fp8_scales == "kept"
    codes = (wanted / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (codes.float() != fused[name].float()).float().mean() < 1e-3
    assert 0.9 < report.retained < 1.1 and 0.9 < report.simulated["int8"]["retained"] < 1.1
    with pytest.raises(CheckpointError, match="--dtype keep"):
        fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "no", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("shape", "block", "known"), [((320, 256), 64, True), ((300, 260), 64, False), ((300, 260), 256, False), ((16, 2048), 128, True)]
)
def test_fp8_blocks_of_another_size_are_told_apart_or_refused(tmp_path, shape, block, known):
    """300 rows in five blocks of 64 are not five blocks of 60, and 16 blocks beside each other are not the scales of 16 rows."""
    torch.manual_seed(0)
    name, scale = "model.layers.0.self_attn.q_proj.weight", torch.rand([-(-size // block) for size in shape]) * 0.002 + 0.002
    weight, delta = (torch.randn(shape) * 30).to(torch.float8_e4m3fn), torch.randn(shape) * 0.01
    for folder in ("base", "delta"):
        (tmp_path / folder).mkdir()
    save_file({name: weight, f"{name}_scale_inv": scale}, tmp_path / "base/model.safetensors")
    quantisation = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantisation}))
    save_file({name: delta}, tmp_path / "delta/task_vector.safetensors")
    if not known:
        with pytest.raises(CheckpointError, match="no known layout"):
            fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "delta", 1.0)], tmp_path / "fused"))
        return
    fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "delta", 1.0)], tmp_path / "fused"))
    each = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]
    codes = ((weight.float() * each - delta) / each).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert (codes != load_file(tmp_path / "fused/model.safetensors")[name].float()).float().mean() < 1e-3


@pytest.mark.parametrize("layout", ["tensor", "row", "block"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_scales_recomputed_hold_an_edit_that_the_kept_ones_clip(tmp_path, layout, scale_dtype):
    name, key, factor, _ = save_fp8(tmp_path, layout, scale_dtype)
    base, adapter = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (next(value for at, value in adapter.items() if side in at) for side in ("lora_A", "lora_B"))
    strength = 10 * float(factor.max()) / 0.003
    wanted = base[name].float() * factor - strength * b @ a
    kept = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "adapter", strength)], tmp_path / "kept"))
    assert any("--fp8-scales recompute" in line for line in kept.warnings) and sum(row["clipped"] for row in kept.per_tensor.values()) > 0
    report = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "adapter", strength)], tmp_path / "new", fp8_scales="recompute"))
    assert report.fp8_scales == "recomputed" and not any("clipped" in row for row in report.per_tensor.values())
    assert report.noise < kept.noise and abs(report.retained - 1) < 0.01
    fused = load_file(tmp_path / "new/model.safetensors")
    assert fused[key].dtype == scale_dtype and fused[key].shape == base[key].shape
    found = per_element(fused[key])
    assert ((fused[name].float() * found - wanted).abs() <= wanted.abs() / 16 * (1 + 1e-5) + found * 2.0**-10).all()
    assert fused[name].float().abs().max() > (224 if scale_dtype == torch.float8_e8m0fnu else 447)
    assert json.loads((tmp_path / "new/sku_manifest.json").read_text())["fp8_scales"] == "recomputed"
    assert verify_checkpoint(tmp_path / "new")["verified"]


def test_fp8_rounds_stochastically_and_only_fp8_has_scales_to_recompute(tmp_path, llama):
    name, key, factor, _ = save_fp8(tmp_path, "row")
    before = load_file(tmp_path / "base/model.safetensors")[name].float() * factor
    nearest = None
    for scale, seed in ((0.02, None), (0.02, 1)):
        report = fuse_checkpoint(FuseRequest(tmp_path / "base", [(tmp_path / "adapter", scale)], tmp_path / f"fused{seed}", seed=seed))
        after = load_file(tmp_path / f"fused{seed}/model.safetensors")[name].float() * factor
        assert (after != before).any() and (seed is None or abs(report.retained - 1) < 0.3 < abs(nearest - 1))
        nearest = report.retained if seed is None else nearest
        # what FP8 loses no --dtype brings back: another one is refused
        assert seed is not None or any("try the unquantised model, --stochastic" in line for line in report.warnings)
    with pytest.raises(ConfigError, match="leave the flag out"):
        fuse_checkpoint(FuseRequest(llama[0], [(llama[1], 1.0)], tmp_path / "no", fp8_scales="recompute"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stochastic_rounding_of_other_dtypes(llama, tmp_path, dtype):
    base, adapter = llama
    one, two = (fuse_checkpoint(FuseRequest(base, [(adapter, 0.01)], tmp_path / str(seed), dtype=dtype, seed=seed)) for seed in (1, 2))
    assert abs(one.retained - 1) < 0.02 and abs(two.retained - 1) < 0.02
    name = "model.layers.0.self_attn.q_proj.weight"
    left, right = (CheckpointReader(tmp_path / str(seed)).tensor(name) for seed in (1, 2))
    assert not torch.equal(left, right) and (left.float() - right.float()).abs().max() <= 2.0**-10


def test_time_is_held_against_a_plain_copy(llama, tmp_path):
    base, adapter = llama
    report = fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], tmp_path / "fused"))
    copy = report.plain_copy
    assert copy["sampled_bytes"] == sum(file.stat().st_size for file in base.glob("*.safetensors")) and copy["seconds"] >= 0
    assert copy["ratio"] == pytest.approx(report.seconds / max(copy["seconds"], 1e-3), rel=0.02)
    assert not list((tmp_path / "fused").glob(".*"))


def test_streaming_through_a_device_writes_the_same_files(llama, tmp_path, monkeypatch):
    """As with a GPU that is faster, but for the device."""
    base, adapter = llama
    fuse_checkpoint(FuseRequest(base, [(adapter, 0.9)], tmp_path / "host"))
    monkeypatch.setattr("sku_vllm.fuse.fuse.check_device", lambda device: on_device(torch.device("cpu")))
    fuse_checkpoint(FuseRequest(base, [(adapter, 0.9)], tmp_path / "device", simulate=["int8"]))
    assert json.loads((tmp_path / "device/sku_manifest.json").read_text())["backend"] == "triton-cpu"
    for file in sorted((tmp_path / "host").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "device" / file.name).read_bytes()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--device"):
        fuse_checkpoint(FuseRequest(base, [(adapter, 0.9)], tmp_path / "no", device="tpu"))


def test_what_another_backend_compiles_is_setup(llama, tmp_path, monkeypatch):
    """A device that takes a second for every kind of edit it has not seen: two factors, or a dense one, and what is nearly cancelled."""
    base, adapter = llama
    name = "model.layers.1.self_attn.k_proj.weight"
    (tmp_path / "dense").mkdir()
    save_file({name: torch.randn(CheckpointReader(base).info(name).shape) * 0.01}, tmp_path / "dense/task_vector.safetensors")
    real, seen = on_device(torch.device("cpu")), set()

    def merge(weight, terms, *, out, seed=None, first_element=0):
        stats = real.merge(before := weight.clone(), terms, out=out, seed=seed, first_element=first_element)
        cancelled = bool((out.float().abs() < before.float().abs() / 64).any())
        kinds = {(weight.dtype, out.dtype, terms[0].a is None, near) for near in {False, cancelled}}
        time.sleep(len(kinds - seen))
        seen.update(kinds)
        return stats

    monkeypatch.setattr("sku_vllm.fuse.fuse.check_device", lambda device: real._replace(merge=merge))
    report = fuse_checkpoint(FuseRequest(base, [(adapter, 1.0), (tmp_path / "dense", 1.0)], tmp_path / "fused"))
    assert len(seen) == 4 and report.setup_seconds >= 4 and report.seconds < 1
    assert abs(report.retained - 1) < 0.01 and set(report.per_tensor) == set(load_adapter(adapter).deltas) | {name}


def test_adapter_of_a_four_bit_base_belongs_to_the_unquantised_one(llama, tmp_path):
    base, adapter = llama
    other = shutil.copytree(adapter, tmp_path / "other")
    run = {"schema": "sku.run/1", "base": "org/model", "base_identity": CheckpointReader(base).identity(), "config": {"quantize": "4bit"}}
    (other / "sku_run.json").write_text(json.dumps(run))
    report = fuse_checkpoint(FuseRequest(base, [(other, 1.0)], tmp_path / "fused"))
    assert any("4bit" in line and "unquantised base" in line for line in report.warnings)
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match=r"org/model: .* belongs to the unquantised base"):
        fuse_checkpoint(FuseRequest(quantised, [(other, 1.0)], tmp_path / "no"))


def test_plain_families_are_loaded_name_by_name():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from sku_vllm.adapter.weight_names import PLAIN

    assert {kind for kind in PLAIN if get_checkpoint_conversion_mapping(kind)} == set()
