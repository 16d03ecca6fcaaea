"""OpenUnlearning's measures of forgetting against their formulas in plain transformers, and through `evaluate_model`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sku_vllm.data import PromptTemplate, Row, load_dataset, read_rows
from sku_vllm.data.forms import generic_rows
from sku_vllm.data.rows import BadRow, rows_digest
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.evaluate import evaluate_model
from sku_vllm.evaluate.forget_quality import rouge_l
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.model import edited_model, load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train.train_request import TrainRequest


@pytest.fixture(scope="module")
def rows(lab: Path) -> list[Row]:
    """Six harmful rows with answers; four have wrong ones, one of these a paraphrase, and the last has no answer."""
    first = read_rows(lab / "forget/seen.jsonl")[:6]
    found = [Row.ask(row.prompt, row.response, perturbed=(first[0].response, first[1].response)) for row in first[2:6]]
    found[0] = Row.ask(first[2].prompt, first[2].response, perturbed=(first[0].response,), paraphrased=first[5].response)
    return [*found, first[0], Row.ask(first[1].prompt)]


def by_hand(model: torch.nn.Module, template: PromptTemplate, rows: list[Row]) -> tuple[float, float]:
    """Probability and truth ratio, one answer after the other, from the loss that transformers gives."""

    def likelihood(row: Row, answer: str) -> float:
        encoded = template.encode(Row.ask(row.prompt, answer))
        ids = torch.tensor([encoded.ids])
        labels = ids.clone()
        labels[0, : encoded.answer_start] = -100
        with torch.no_grad():
            return float(torch.exp(-model(input_ids=ids, labels=labels).loss))

    probability = np.mean([likelihood(row, row.response) for row in rows if row.response])
    ratios = []
    for row in rows:
        if row.perturbed:
            wrong = np.prod([likelihood(row, text) for text in row.perturbed]) ** (1 / len(row.perturbed))
            ratio = wrong / likelihood(row, row.paraphrased or row.response)
            ratios.append(min(ratio, 1 / ratio))
    return float(probability), float(np.mean(ratios))


def test_quality_of_an_edited_model_beside_its_base(lab: Path, rows: list[Row], tmp_path: Path) -> None:
    sets = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    config = TrainConfig.of("gradient-ascent", steps=2, rank=2, lr=1e-2, batch_size=4)
    train_adapter(TrainRequest(lab / "llama", *sets, tmp_path / "adapter", config), progress=False)
    spec = ModelSpec(lab / "llama", adapter=tmp_path / "adapter", scale=1.0)
    silent = [Row.ask(row.prompt) for row in rows]
    retain = read_rows(lab / "retain/test.jsonl")[:4]
    asked = EvalRequest(
        spec, {"harm": rows, "silent": silent}, retain, "refusal", config=EvalConfig(samples=1, max_new_tokens=24), output=tmp_path / "out"
    )
    report = evaluate_model(asked)
    written = json.loads((tmp_path / "out/sku_eval.json").read_text(encoding="utf-8"))
    quality = written["forget_quality"]["harm"]
    assert list(written["forget_quality"]) == ["harm"] and (quality["n"], quality["truth_ratio_n"]) == (5, 4)
    template = PromptTemplate.of(load_tokenizer(lab / "llama"))
    for found, model in ((quality, edited_model(spec)), (quality["base"], load_model(lab / "llama"))):
        assert (found["probability"], found["truth_ratio"]) == pytest.approx(by_hand(model, template, rows), rel=1e-4)
    assert quality["base"]["probability"] > quality["probability"] * 1.01
    greedy = [row["response"] for row in report.rows if row["set"] == "harm" and row["mode"] == "greedy"]
    assert quality["rouge_l"] == rouge_l(rows, greedy) is not None


def test_rouge_l_recall_by_hand() -> None:
    """Longest common subsequences of 4 of 6, 0 of 2 and, words stemmed, 2 of 2 words; the row without a response does not count."""
    pytest.importorskip("rouge_score", reason="pip install 'sku-vllm[eval]'")
    right = ["the cat sat on the mat", "no idea", "Mixing powders", None]
    answers = ["The mat: a cat sat, on", "yes", "mix a powder", "anything"]
    assert rouge_l([Row.ask("q", text) for text in right], answers) == pytest.approx((4 / 6 + 0 + 2 / 2) / 3)


def test_rows_with_wrong_answers() -> None:
    (row,) = generic_rows({"prompt": "q", "response": "a", "perturbed_answer": ["b", "c"], "paraphrased_answer": "d"}, None)
    assert (row.perturbed, row.paraphrased) == (("b", "c"), "d")
    for field, value in (("perturbed_answer", [1]), ("paraphrased_answer", ["d"])):
        with pytest.raises(BadRow, match=f"'{field}'"):
            list(generic_rows({"prompt": "q", field: value}, None))
    assert rows_digest([Row.ask("q", "a")]) != rows_digest([Row.ask("q", "a", perturbed=("b",))])


def test_digests_of_rows_without_them_are_those_of_before() -> None:
    """An unfinished run of an earlier version holds them."""
    assert rows_digest([Row.ask("q", "a", id="1")]) == "0061ac05fae774f88545c6fc18805cfa01395c4473ae082682cfcea868b6ae2b"
