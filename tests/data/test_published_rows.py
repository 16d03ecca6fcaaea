"""Rows as published sets really hold them: speakers, marks, prompts in a template, columns beside the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.data import read_source
from sku_vllm.errors import DataError


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(path: Path, safe: bool | None = False) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.response) for row in read_source(path, safe=safe).rows]


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns]}


@pytest.mark.parametrize("who", ["gpt", "chatgpt", "bing", "bard", "claude", "GPT-4", "Assistant", "model"])
def test_speakers_of_sharegpt(tmp_path: Path, who: str) -> None:
    assert pairs(written(tmp_path / "a.jsonl", talk(("human", "p"), (who, "a")))) == [("p", "a")]


def test_conversations_that_no_user_can_mend_are_left_out(tmp_path: Path) -> None:
    good = talk(("human", "p"), ("gpt", "a"))
    bad = [talk(("gpt", "hello")), talk(("human", ""), ("gpt", "a")), talk(("martian", "x"), ("gpt", "a"))]
    reading = read_source(written(tmp_path / "a.jsonl", *bad, good))
    asks = "asks nothing: no user's turn, or an empty one, stands before the answer"
    assert len(reading.rows) == 1 and dict(reading.left_out) == {asks: 2, "has a speaker that is not known ('martian')": 1}
    own = {"messages": [{"role": "asistant", "content": "x"}]}
    with pytest.raises(DataError, match="'asistant' is none; other column names"):
        read_source(written(tmp_path / "b.jsonl", own))
    with pytest.raises(DataError, match="'prompt' has to be a list.*not int"):
        read_source(written(tmp_path / "c.jsonl", {"prompt": 5, "response": "r"}))


def test_turns_under_other_keys(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "text": "p"}, {"speaker": "bot", "text": "a"}]}
    assert pairs(written(tmp_path / "a.jsonl", record)) == [("p", "a")]


CHATML = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
FILLED = "Below is an instruction that describes a task.\n\n### Instruction:\np\n\n### Input:\nq\n\n### Output:\na"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": CHATML, "response": "a"}, ("p", "a")),
        ({"prompt": "<s>[INST] p [/INST]", "completion": "a"}, ("p", "a")),
        ({"instruction": "p", "input": "q", "output": "a", "prompt": FILLED}, ("p\n\nq", "a")),
        ({"inputs": "p", "targets": "a", "language": "English"}, ("p", "a")),
        ({"question": "p", "answer": True, "passage": "t"}, ("t\n\np", "yes")),
        ({"prompt": "p", "target_response": "a", "target": "Sure", "goal": "g"}, ("p", "a")),
        ({"input": [{"role": "user", "content": "p"}], "ideal": "a"}, ("p", "a")),
    ],
    ids=["chatml", "llama", "answer in the prompt", "aya", "boolq", "judge comparison", "evals"],
)
def test_a_record_asks_and_answers(tmp_path: Path, record: dict[str, Any], expected: tuple[str, str]) -> None:
    assert pairs(written(tmp_path / "a.jsonl", record)) == [expected]


def test_known_columns_that_a_form_does_not_read_are_named(tmp_path: Path) -> None:
    record = {"prompt": "p", "response": "r", "context": "c", "options": ["x"]}
    assert read_source(written(tmp_path / "a.jsonl", record)).unread == ["context", "options"]


def test_contexts_of_harmbench_on_the_hub(tmp_path: Path) -> None:
    assert pairs(written(tmp_path / "a.jsonl", {"prompt": "p", "context": "c", "category": "x"})) == [("c\n\n---\n\np", None)]


WILD = [
    {"vanilla": "v", "adversarial": "", "completion": "I will not.", "data_type": "vanilla_harmful"},
    {"vanilla": "v", "adversarial": "w", "completion": "I will not.", "data_type": "adversarial_harmful"},
    {"vanilla": "x", "adversarial": "y", "completion": "good", "data_type": "adversarial_benign"},
]
TOXIC = [
    {"conv_id": "a", "user_input": "p", "model_output": "a", "toxicity": 0, "jailbreaking": 0},
    {"conv_id": "b", "user_input": "q", "model_output": "b", "toxicity": 1, "jailbreaking": 0},
]


def test_prompts_that_are_marked(tmp_path: Path) -> None:
    """What WildJailbreak answers to a harmful prompt is a refusal, which no forget set is to unlearn."""
    wild, toxic = written(tmp_path / "w.jsonl", *WILD), written(tmp_path / "t.jsonl", *TOXIC)
    assert pairs(wild) == [("v", None), ("w", None)] and pairs(wild, True) == [("y", "good")]
    assert pairs(wild, None) == [("v", "I will not."), ("w", "I will not."), ("y", "good")]
    assert pairs(toxic) == [("q", None)] and pairs(toxic, True) == [("p", "a")] and len(pairs(toxic, None)) == 2
    with pytest.raises(DataError, match="no 'response'; training needs an answer"):
        read_source(wild, need_response=True)
    with pytest.raises(DataError, match="no unsafe answers or prompts"):
        read_source(written(tmp_path / "s.jsonl", WILD[2]))


def test_a_mark_without_an_answer_is_left_out(tmp_path: Path) -> None:
    records = [{"prompt": "p", "response": "", "is_safe": False}, {"prompt": "p", "response": "a", "is_safe": False}]
    reading = read_source(written(tmp_path / "a.jsonl", *records), need_response=True)
    assert len(reading.rows) == 1 and dict(reading.left_out) == {"with a mark but without an answer": 1}


def test_an_empty_side_of_a_dialogue_is_an_empty_answer(tmp_path: Path) -> None:
    pair = {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: "}
    assert pairs(written(tmp_path / "a.jsonl", pair)) == [("p", "")]


def test_a_pair_of_single_turns(tmp_path: Path) -> None:
    sides = {side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")}
    assert pairs(written(tmp_path / "a.jsonl", talk(("human", "p")) | sides)) == [("p", "rejected")]


def test_dialogues_in_capitals_and_texts_that_are_none(tmp_path: Path) -> None:
    glaive = "USER: p\n\n\nASSISTANT: <functioncall> f <|endoftext|>\n\n\nFUNCTION RESPONSE: 5\n\n\nASSISTANT: a <|endoftext|>"
    records = [{"chat": glaive, "system": "s"}, {"chat": "just a text"}, {"chat": CHATML + "a<|im_end|>"}]
    reading = read_source(written(tmp_path / "a.jsonl", *records))
    assert [turn["role"] for turn in reading.rows[0].messages] == ["system", "user", "assistant", "tool"]
    assert [row.response for row in reading.rows] == ["a", "a"] and dict(reading.left_out) == {"a text that is no dialogue": 1}


def test_a_hidden_key_is_no_answer(tmp_path: Path) -> None:
    record = {"question": "p", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": ""}
    assert pairs(written(tmp_path / "a.jsonl", record)) == [("p\nA. w\nB. x", None)]


def test_ids_of_both_releases_of_xstest(tmp_path: Path) -> None:
    record = {"id_v1": "v1-1", "id_v2": "v2-1", "type": "contrast_homonyms", "prompt": "p", "completion": "a"}
    assert read_source(written(tmp_path / "a.jsonl", record)).rows[0].id == "v2-1"
