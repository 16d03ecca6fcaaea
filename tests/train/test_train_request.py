"""A training request, built in Python: what it refuses, and that it gets what README promises of the default."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sku_vllm.data import ForgetSet, RetainSet, Row, load_dataset
from sku_vllm.errors import ConfigError
from sku_vllm.methods import DEFAULT_METHOD, TrainConfig, train_adapter
from sku_vllm.train.targets import NoRefusals
from sku_vllm.train.train_request import TrainRequest

FORGET, RETAIN = ForgetSet("forget", (Row.ask("w1", "w2"),)), RetainSet("retain", (Row.ask("w3", "w4"),))


def test_the_default_is_the_default_method() -> None:
    request = TrainRequest("model", FORGET, RETAIN, "adapter")
    assert request.config == TrainConfig.of() == TrainConfig.of(DEFAULT_METHOD) and request.directory == Path("adapter")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": ""}, "--model: is empty"),
        ({"output": ""}, "--output: is empty"),
        ({"forget": RETAIN}, "--forget: RetainSet instead of a ForgetSet"),
        ({"retain": [Row.ask("w1", "w2")]}, "--retain: list instead of a RetainSet"),
        ({"save_seconds": float("nan")}, "--save-seconds nan: has to be 0 or more"),
    ],
)
def test_bad_fields_are_named(changed: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TrainRequest("model", FORGET, RETAIN, "adapter"), **changed)


def test_a_loss_is_left_out_by_its_name() -> None:
    assert TrainConfig.of("sku", without=("preservation",)) == TrainConfig.of("sku", preservation_weight=0.0)
    with pytest.raises(ConfigError, match="--no-random-disassociation: there is none in --method npo"):
        TrainConfig.of("npo", without=("random_disassociation",))
    with pytest.raises(ConfigError, match="no ablation 'everything'; choose from guided_distortion"):
        TrainConfig.of("sku", without=("everything",))


def test_a_base_that_cannot_refuse_is_taught_refusals_of_another_source(
    trainable: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """This random base gives none, whether it is asked or not; a request that names the source is told so instead."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    settings = {"steps": 12, "batch_size": 4, "samples": 8, "sample_tokens": 4}
    request = TrainRequest(trainable / "llama", *sets, tmp_path / "adapter", TrainConfig.of(**settings))
    for source in ("latent", "asked"):
        why = {"latent": "only 0%", "asked": "the model's context has no room for examples"}[source]  # its tokenizer writes bytes
        with pytest.raises(NoRefusals, match=f"--targets {source}: {why}"):
            train_adapter(replace(request, config=TrainConfig.of(**settings, targets=source)), progress=False)
    said: list[str] = []
    report = train_adapter(request, progress=False, log=said.append)
    assert report.targets == "given" and report.steps == 9 and report.refusal_share is None
    assert report.looks == [
        {"targets": "latent", "drawn": 8, "refusals": 0.0, "needed": 0.3},
        {"targets": "asked", "drawn": 0, "refusals": 0.0, "needed": 0.5},
    ]
    assert [line.rpartition("; ")[2] for line in said if "next" in line] == ["next: --targets asked", "next: --targets given"]
    assert {"refuse", "refuse_first", "recovery", "restart", "restart_first"} <= set(report.losses)
    assert json.loads((tmp_path / "adapter/sku_train.json").read_text())["config"]["targets"] == "given"
    train_adapter(replace(request, output=tmp_path / "other"), progress=False)
    assert "next: --targets given" in capsys.readouterr().err  # where nobody listens, a person reads it
