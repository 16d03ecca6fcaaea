"""`sku judge`: every row it is given comes out, in order, with all its columns, a label and the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.evaluate.judge_file import judge_file


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.json").write_text('["clog"]')
    return f"lexicon:{tmp_path / 'words.json'}"


def judged(tmp_path: Path, words: str, records: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = judge_file([words], str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"), **options)
    return told, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_marked_answers_all_come_out_whatever_their_mark(tmp_path: Path, words: str) -> None:
    records = [
        {"prompt": f"q{n}", "response": "I can't help with that." if n % 2 else "clog it", "is_safe": n % 2 == 1, "category": "xy"[n % 2]}
        for n in range(10)
    ]
    told, rows = judged(tmp_path, words, records)
    assert [{key: row[key] for key in records[0]} for row in rows] == records
    assert [row["label"] for row in rows] == ["harmful", "refusal"] * 5 and rows[0]["reason"] == "clog" and rows[1]["reason"] == "wording"
    assert told["n"] == 10 and {name: part["harmful"] for name, part in told["by_category"].items()} == {"x": 1.0, "y": 0.0}


def test_columns_that_the_label_would_hide_are_kept(tmp_path: Path, words: str) -> None:
    records = [{"id": "v2-1", "type": "homonyms", "prompt": "q", "completion": "clog it", "label": "safe", "judge": "someone"}]
    _, (row,) = judged(tmp_path, words, records)
    assert (row["label"], row["given_label"], row["given_judge"], row["judge"]) == ("harmful", "safe", "someone", words)
    assert row["response"] == "clog it" == row["completion"] and row["type"] == "homonyms"


def test_of_several_answers_each_is_a_row(tmp_path: Path, words: str) -> None:
    records = [
        {"prompt": "p", "response_0": "fine", "response_1": "clog it", "is_response_0_safe": True, "is_response_1_safe": False},
        {"prompt": "p", "response_0": "fine", "response_1": "clog it", "is_response_0_safe": True, "is_response_1_safe": False},
    ]
    told, rows = judged(tmp_path, words, records)
    assert [(row["response"], row["label"]) for row in rows] == [("fine", "benign"), ("clog it", "harmful")] * 2
    assert (told["n"], told["prompts"]) == (4, 1), "one prompt is one cluster"


def test_conversations_keep_their_turns(tmp_path: Path, words: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "same"}]
    records = [
        {"messages": [*turns, {"role": "assistant", "content": "clog it"}], "note": 1},
        {"messages": [{"role": "user", "content": "other"}, *turns[1:]], "response": "fine", "note": 2},
    ]
    told, rows = judged(tmp_path, words, records)
    assert [row["messages"] for row in rows] == [record["messages"] for record in records] and [row["note"] for row in rows] == [1, 2]
    assert told["prompts"] == 2 and rows[0]["response"] == "clog it"


def test_reasoning_is_counted_apart(tmp_path: Path, words: str) -> None:
    told, rows = judged(tmp_path, words, [{"prompt": "q", "response": "<think>clog it</think>I can't help with that."}])
    assert rows[0]["label"] == "harmful" and rows[0]["harmful_in_reasoning"] is True and told["harmful_in_reasoning"] == 1.0


def test_a_table_with_other_names(tmp_path: Path, words: str, run_sku: Callable) -> None:
    (tmp_path / "t.csv").write_text("Question;Reply text\nq;clog it\n", encoding="utf-8")
    command = ["judge", "--judge", words, "--input", tmp_path / "t.csv", "--output", tmp_path / "v.jsonl"]
    done = run_sku(*command, "--columns", "response=Reply text", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "v.jsonl").read_text())
    assert (row["Question"], row["prompt"], row["Reply text"], row["label"]) == ("q", "q", "clog it", "harmful")
    assert run_sku(*command).returncode == 2, "without the mapping there is no answer to judge"


GRADES = """
from sku_vllm.judges.exchange import Finding

class Grades:
    name = "grades"

    def judge(self, exchanges):
        return [one.harmful for one in self.findings(exchanges)]

    def findings(self, exchanges):
        return [Finding(score > 0.5, f"score {score:g}", score=score) for score in (len(one.response) / 8 for one in exchanges)]
"""


def test_scores_are_averaged_by_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """StrongREJECT prints mean scores, HarmBench shares by functional and semantic category."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "grading.py").write_text(GRADES)
    names = ("Behavior", "BehaviorID", "FunctionalCategory", "SemanticCategory", "generation")
    told = [
        ("a", "1", "standard", "illegal", "x" * 8),
        ("b", "2", "contextual", "illegal", "x" * 2),
        ("c", "3", "standard", "other", "x" * 4),
    ]
    found, rows = judged(tmp_path, "python:grading:Grades", [dict(zip(names, one, strict=True)) for one in told])
    assert [row["score"] for row in rows] == [1.0, 0.25, 0.5] and found["score"] == pytest.approx(1.75 / 3)
    means = {name: part["score"] for name, part in found["by_category"].items()}
    assert means == {"contextual": 0.25, "illegal": 0.625, "other": 0.5, "standard": 0.75}
    assert found["by_category"]["standard"]["harmful"] == 0.5 and "by_set" not in found
