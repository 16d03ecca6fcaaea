"""`--check`: what quantisers of record leave of an edit, and what is said where their packages are missing."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sku_vllm.adapter.adapter import load_adapter
from sku_vllm.adapter.placement import place
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.data import PromptTemplate
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.fuse.calibrated_quantisers import QUANTISE
from sku_vllm.fuse.check_calibrated import check_calibrated
from sku_vllm.fuse.check_quantisers import CALIBRATED, _k_kind, quantisers
from sku_vllm.fuse.fuse_request import FuseRequest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import IDS, fuse, llama, lora  # noqa: E402

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("gguf:Q4_0", "gguf"), ("gguf:Q8_0", "gguf")])
def test_the_share_of_the_edit_that_a_quantiser_leaves(kind: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    base = llama(hidden_size=64)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", 0.05, check=[kind], simulate=["int8"])
    before, after = (load_file(tmp_path / name / "model.safetensors")[NAME] for name in ("base", "fused"))
    quantise = quantisers([kind], {})[kind]
    edit = before.double() - after.double()
    kept = quantise(NAME, before).double() - quantise(NAME, after).double()
    found = report.per_tensor[NAME][kind]
    assert found["retained"] == pytest.approx(((kept * edit).sum() / (edit * edit).sum()).item(), abs=1e-4)
    assert set(report.checked) == {kind} and set(report.simulated) == {"int8"}
    wide = quantise(NAME, torch.linspace(-1, 1, 4096).view(32, 128))
    assert (wide - torch.linspace(-1, 1, 4096).view(32, 128)).abs().max() < 0.16, "it is the weight, in few levels"


def test_what_cannot_run_here_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.functional", "gguf", "llama_cpp"):
        monkeypatch.setitem(sys.modules, module, None)
    for kind, extra in (("nf4", "nf4"), ("gguf:Q8_0", "gguf"), ("gguf:Q4_K_M", "gguf")):
        with pytest.raises(ConfigError, match=rf"^--check {kind}: needs \w+; install it with: pip install 'sku-vllm\[{extra}\]'$"):
            quantisers([kind], {})
    for kind, package in (("gptq", "gptqmodel"), ("awq", "llmcompressor")):
        if find_spec(package) is None:
            with pytest.raises(ConfigError, match=rf"--check {kind}: needs {package}; install it with: pip install 'sku-vllm\[{kind}\]'"):
                FuseRequest("base", [("adapter", 1.0)], "out", check=[kind], calibrate="rows.jsonl")
    with pytest.raises(ConfigError, match="--check int4: unknown; choose from nf4, gguf:Q4_0.*gptq, awq"):
        FuseRequest("base", [("adapter", 1.0)], "out", check=["int4"])
    with pytest.raises(ConfigError, match="--calibrate: nothing here is calibrated on text; it goes with --check gptq or awq"):
        FuseRequest("base", [("adapter", 1.0)], "out", check=["nf4"], calibrate="rows.jsonl")


class Coded(torch.nn.Module):
    """A linear layer as quantisers leave it: codes and scales, no weight, a bias."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.bias = weight.shape[1], torch.nn.Parameter(torch.ones(len(weight)))
        self.scale = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.codes * self.scale).T + (0 if self.bias is None else self.bias)


def coded(source: Path, target: Path, texts: list[str]) -> Any:
    """Stands in for gptqmodel: the attention of a checkpoint in four bits, a row at a time; the rest as it is."""
    assert texts == ["Question: a b Answer: a"] * 2 and not target.exists()
    model = AutoModelForCausalLM.from_pretrained(source)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Coded(layer.self_attn.q_proj.weight.detach())
    return model


def test_a_calibrated_quantiser_is_run_on_base_and_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "?"])}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?").save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "embed_tokens"])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b", "response": "a"}\n' * 2)
    monkeypatch.setitem(CALIBRATED, "gptq", "json")  # a package that is installed
    with pytest.raises(ConfigError, match="--check gptq: is calibrated on text; give some rows with --calibrate FILE"):
        FuseRequest("base", [("adapter", 1.0)], "out", check=["gptq"])
    monkeypatch.setattr(PromptTemplate, "prompt_text", lambda self, row: f"Question: {row.prompt} Answer: ")
    monkeypatch.setitem(QUANTISE, "gptq", coded)
    asked = {"check": ["gptq"], "calibrate": tmp_path / "rows.jsonl", "simulate": ["int8"]}
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", 0.05, **asked)
    before, after = (load_file(tmp_path / name / "model.safetensors")[NAME].double() for name in ("base", "fused"))
    edit = before - after
    left = [(values / scale).round() * scale for values in (before, after) if (scale := values.abs().amax(1, keepdim=True) / 7) is not None]
    wanted = (((left[0] - left[1]) * edit).sum() / (edit * edit).sum()).item()
    assert report.per_tensor[NAME]["gptq"]["retained"] == pytest.approx(wanted, abs=1e-4)
    down = report.per_tensor["model.layers.1.mlp.down_proj.weight"]
    assert down["gptq"]["retained"] == pytest.approx(down["retained"], abs=1e-4), "which was not quantised"
    assert set(report.checked) == {"gptq"} and set(report.simulated) == {"int8"}
    manifest = json.loads((tmp_path / "fused/sku_manifest.json").read_text())
    assert manifest["tensors"][NAME]["gptq"] == report.per_tensor[NAME]["gptq"]

    def fails(source: Path, target: Path, texts: list[str]) -> Any:
        raise ZeroDivisionError("division by zero\nat line 3")

    monkeypatch.setitem(QUANTISE, "gptq", fails)
    with pytest.raises(RunError, match=r"^gptq: json failed on this model \(ZeroDivisionError: division by zero\)$"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", **asked)
    assert not (tmp_path / "again").exists()


def test_a_layer_of_gpt2_is_compared_the_same_way_round_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 stores [in, out], and a quantiser's layer in its place is [out, in]: a square one fits either way."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, **IDS))
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True)

    def coded(source: Path, target: Path, texts: list[str]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(source)
        block = model.transformer.h[0]
        block.attn.c_proj = Coded(block.attn.c_proj.weight.detach().T)
        return model

    monkeypatch.setitem(QUANTISE, "gptq", coded)
    reader, adapter = CheckpointReader(tmp_path / "base"), load_adapter(tmp_path / "adapter")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    found = check_calibrated("gptq", reader, tmp_path / "fused", place(reader, [(adapter, 1.0)]), ["a"])
    assert set(found) == {"transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight"}
    assert all(stats.retained == pytest.approx(1, abs=0.1) for stats in found.values()), found


@pytest.mark.parametrize(("kind", "package"), [("gptq", "gptqmodel"), ("awq", "llmcompressor")])
def test_the_quantisers_themselves(kind: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    from sku_vllm.lab import make_lab

    lab = make_lab(tmp_path / "lab")
    base = AutoModelForCausalLM.from_pretrained(lab / "llama", dtype=torch.float32)
    lora(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    report = fuse(lab / "llama", tmp_path / "adapter", tmp_path / "fused", 0.3, check=[kind], calibrate=lab / "retain/validation.jsonl")
    assert 0.5 < report.checked[kind]["retained"] < 1.5 and all(kind in row for row in report.per_tensor.values())


def test_the_mixture_of_q4_k_m() -> None:
    """Of 16 layers llama.cpp gives six bits to the first two, the last two, and every third between (use_more_bits)."""
    six = [layer for layer in range(16) if _k_kind(f"model.layers.{layer}.self_attn.v_proj.weight", 16) == "Q6_K"]
    assert six == [0, 1, 4, 7, 10, 13, 14, 15]
    assert _k_kind("model.layers.3.self_attn.q_proj.weight", 16) == "Q4_K" and _k_kind("lm_head.weight", 16) == "Q6_K"
