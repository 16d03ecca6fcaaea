"""`--dtype auto`: what this machine computes fastest in, the same on resume, and in the record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sku_vllm import compute_dtype
from sku_vllm.compute_dtype import computed_in, speed_over_float32
from sku_vllm.data import Row, load_dataset
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.evaluate import evaluate_model
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.methods import TrainConfig
from sku_vllm.model import load_model, settle_dtype
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train.resume import as_begun
from sku_vllm.train.train_request import TrainRequest


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How much faster 16-bit dtypes are here; to be set by the test."""
    found = {"value": 1.0}
    compute_dtype._measured.cache_clear()
    monkeypatch.setattr(compute_dtype, "speed_over_float32", lambda dtype: found["value"])
    yield found
    compute_dtype._measured.cache_clear()


@pytest.fixture
def half(tiny: Path, tmp_path: Path) -> Path:
    """A model that is stored in bfloat16."""
    model = load_model(ModelSpec(tiny / "base", dtype="bfloat16"))
    model.save_pretrained(tmp_path / "half")
    for file in (tiny / "base").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "half/chat_template.jinja").write_bytes((tiny / "base/chat_template.jinja").read_bytes())
    return tmp_path / "half"


def test_the_faster_one_and_only_on_a_cpu(speed: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    assert computed_in("float16", "bfloat16", "cpu") == "float16"  # as asked
    assert computed_in("auto", "bfloat16", "cuda") == "bfloat16"
    assert computed_in("auto", "float32", "cpu") == "float32"
    assert computed_in("auto", None, "cpu") == "auto"  # quantised: its own library knows
    assert capsys.readouterr().err == ""
    speed["value"] = 0.2
    assert [computed_in("auto", "bfloat16", "cpu") for _ in range(2)] == ["float32"] * 2
    assert capsys.readouterr().err.count("--dtype auto: computing in float32") == 1  # one line a process
    compute_dtype._measured.cache_clear()
    speed["value"] = 1.1  # too close to be sure of it tomorrow
    assert computed_in("auto", "bfloat16", "cpu") == "float32"
    compute_dtype._measured.cache_clear()
    speed["value"] = 3.0
    assert computed_in("auto", "bfloat16", "cpu") == "bfloat16"


def test_weights_that_do_not_fit_in_float32_stay(speed: dict[str, float]) -> None:
    speed["value"] = 0.2
    assert computed_in("auto", "bfloat16", "cpu", weight_bytes=1 << 45) == "bfloat16"


def test_the_measurement_is_quick_and_finite() -> None:
    assert 0 < speed_over_float32("bfloat16") < 1000


def test_a_model_is_loaded_in_it_and_its_base_too(half: Path, speed: dict[str, float]) -> None:
    speed["value"] = 0.2
    assert load_model(half).dtype is torch.float32
    assert load_model(ModelSpec(half, dtype="bfloat16")).dtype is torch.bfloat16
    spec = settle_dtype(ModelSpec(half, base=half))
    assert spec.computed_in == "float32" and spec.reference is not None and spec.reference.computed_in == "float32"


def test_an_evaluation_says_it_and_goes_on_with_it(
    half: Path, tmp_path: Path, speed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed["value"] = 0.2
    rows = [Row.ask("w1 w2 w3")]
    request = EvalRequest(ModelSpec(half), {"f": rows}, rows, "refusal", config=EvalConfig(0, max_new_tokens=2), output=tmp_path / "out")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sku_vllm.evaluate.measurement.perplexity", stopped)
        evaluate_model(request)
    compute_dtype._measured.cache_clear()
    speed["value"] = 3.0  # another machine
    evaluate_model(replace(request, resume=True))
    config = json.loads((tmp_path / "out/sku_eval.json").read_text())["config"]
    assert (config["dtype"], config["computed_in"]) == ("auto", "float32")


def test_training_goes_on_in_what_it_began_with(trainable: Path, tmp_path: Path) -> None:
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    request = TrainRequest(trainable / "llama", *sets, tmp_path / "out", TrainConfig.of("task-vector"), resume=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/train_config.json").write_text('{"method": "task-vector", "dtype": "auto", "computed_in": "bfloat16"}')
    assert as_begun(request).config.computed_in == "bfloat16"
    asked = replace(request, config=TrainConfig.of("task-vector", dtype="float32"))
    assert as_begun(asked).config.computed_in is None  # refused later: it is another dtype
