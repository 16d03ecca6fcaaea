"""`sku eval --backend vllm --quantization NAME`, and checkpoints that are stored quantised: the model as it is served."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sku_vllm.data import Row
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.evaluate.opened import opened
from sku_vllm.model_spec import ModelSpec

RunSku = Callable[..., subprocess.CompletedProcess[str]]
INT8 = "int8_per_channel_weight_only"


def _request(lab: Path, quantization: str) -> EvalRequest:
    rows = [Row.ask("Hi")]
    model = ModelSpec(lab / "llama")
    return EvalRequest(model, forget={"f": rows}, retain=rows, judge="refusal", backend="vllm", quantization=quantization)


def test_the_name_reaches_the_engine_and_a_refusal_is_one_line(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm")
    given: dict[str, Any] = {}

    def engine(**settings: Any) -> None:
        given.update(settings)
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(vllm, "LLM", engine)
    with (
        pytest.raises(ConfigError, match=f"--quantization fp8: .* initialization failed.* {INT8} does on any CPU"),
        opened(_request(lab, "fp8")),
    ):
        pass
    assert given["quantization"] == "fp8"
    with pytest.raises(ConfigError, match="--quantization fp9: .* did you mean 'fp8'"), opened(_request(lab, "fp9")):
        pass
    assert _request(lab, "fp8").to_json()["quantization"] == "fp8"


def _compressed(source: Path, target: Path) -> None:
    """The checkpoint as compressed-tensors stores it for W8A8: int8 weights with a scale a row; activations quantised as they come."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensor.float() / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**shared, "strategy": "channel", "dynamic": False},
        "input_activations": {**shared, "strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True], ids=["as it is loaded", "compressed-tensors"])
def test_a_quantised_model_is_measured_as_it_is_served(lab: Path, tmp_path: Path, run_sku: RunSku, stored: bool) -> None:
    pytest.importorskip("vllm")
    model, flags = lab / "llama", ["--quantization", INT8]
    if stored:
        model, flags = tmp_path / "compressed", ["--base", lab / "llama"]
        _compressed(lab / "llama", model)
    for name in ("forget/unseen", "retain/test"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / Path(name).name).write_text("".join(lines[:8]), encoding="utf-8")
    asked = ["--forget", f"u={tmp_path / 'unseen'}", "--retain", tmp_path / "test", "--judge", f"lexicon:{lab / 'lexicon.json'}"]
    settings = ["--samples", 0, "--max-new-tokens", 24, "--backend", "vllm", "--output", tmp_path / "measured"]
    done = run_sku("eval", "--model", model, *flags, *asked, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "measured/sku_eval.json").read_text())
    assert record["config"]["quantization"] == (None if stored else INT8)
    if stored:
        assert 0.8 < record["retain"]["perplexity_ratio"] < 1.25 and record["retain"]["perplexity_ratio"] != 1
