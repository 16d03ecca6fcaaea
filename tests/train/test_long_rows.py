"""Prompts that leave no room for an answer: skipped, counted and named, or an error; nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from sku_vllm.data import PromptTemplate, Row, load_dataset
from sku_vllm.data.long_rows import LongRows
from sku_vllm.errors import DataError
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.evaluate import evaluate_model
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.evaluate.tune_request import TuneRequest
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.model import load_tokenizer
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train.train_request import TrainRequest

LONG = Row.ask("w1 " * 300, "w2", id="a-long-one")


def test_training_goes_on_without_them_and_says_which(trainable: Path, tmp_path: Path) -> None:
    forget, retain = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    short = TrainRequest(trainable / "llama", forget, retain, tmp_path / "short", TrainConfig.of("sku", steps=3, batch_size=4, rank=4))
    nameless = replace(LONG, id=None)
    long = replace(
        short,
        forget=replace(forget, rows=(LONG, *forget.rows)),
        retain=replace(retain, rows=(*retain.rows, nameless, nameless)),
        output=tmp_path / "long",
    )
    said: list[str] = []
    report = train_adapter(long, progress=False, log=said.append)
    assert report.skipped_rows == {"forget": 1, "retain": 2}
    assert [line.split(" (")[0] + line.split(")")[1] for line in said] == [
        "warning: 1 forget prompts leave no room for an answer and were skipped: rows a-long-one",
        "warning: 2 retain prompts leave no room for an answer and were skipped: rows 61, 62",
    ]
    assert train_adapter(short, progress=False, log=said.append).skipped_rows == {"forget": 0, "retain": 0} and len(said) == 2
    weights = "adapter_model.safetensors"
    assert (tmp_path / "long" / weights).read_bytes() == (tmp_path / "short" / weights).read_bytes()
    with pytest.raises(DataError, match="forget row a-long-one: its prompt alone has .* --max-length is 256; .* --on-long skip"):
        train_adapter(replace(long, config=replace(long.config, on_long="error"), output=tmp_path / "error"), progress=False)
    assert not (tmp_path / "error").exists()


def test_a_set_of_long_prompts_alone_is_an_error(trainable: Path) -> None:
    template = PromptTemplate.of(load_tokenizer(trainable / "llama"))
    exact = len(template.prompt_ids(LONG))
    with pytest.raises(DataError, match=f"retain set: none of its 2 prompts .* shortest has {exact} tokens and --max-length is {exact}"):
        LongRows(template, exact, "--max-length").fitting("retain", [LONG, LONG])
    for limit in (exact + 1, None):  # one token of room is room
        assert LongRows(template, limit, "--max-length").fitting("retain", [LONG]) == (LONG,)
    many = LongRows(template, exact, "--max-length")
    assert len(many.fitting("forget", [Row.ask("w1"), *[LONG] * 9])) == 1
    (line,) = many.warnings
    assert line.endswith("rows " + "a-long-one, " * 5 + "…") and many.counts == {"forget": 9}


def test_measurements_go_on_without_them(trainable: Path, tmp_path: Path) -> None:
    """eval, tune and attack make their questions in the same place; the test data of tune has counts of its own."""
    short = [Row.ask("w3", "w4")]
    sets = {"forget": {"f": [LONG, *short]}, "retain": [*short, LONG, LONG], "judge": "refusal"}
    request = EvalRequest(
        ModelSpec(trainable / "llama"), **sets, config=EvalConfig(samples=0, max_new_tokens=2), output=tmp_path / "measured"
    )
    report = evaluate_model(request)
    assert report.to_json()["skipped_rows"] == {"f": 1, "retain": 2} and report.retain["n"] == 1
    assert [line.split(" (")[0] for line in report.warnings] == [
        "warning: 1 f prompts leave no room for an answer",
        "warning: 2 retain prompts leave no room for an answer",
    ]
    with pytest.raises(DataError, match="^f set, row 1: its prompt has"):
        evaluate_model(replace(request, on_long="error", output=None))
    tune = TuneRequest(ModelSpec(trainable / "llama", adapter="a"), **sets, test_forget={"f": short}, test_retain=[LONG, *short])
    questions = tune.questions()
    test = tune.test_questions(questions.judge)
    assert test is not None and (questions.skipped, test.skipped) == ({"f": 1, "retain": 2}, {"f": 0, "retain": 1})
