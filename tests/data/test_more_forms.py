"""Forms beside the well-known ones: other ways to write turns, answers and tables, read by their structure or refused in a line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.data import read_source
from sku_vllm.errors import DataError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from test_formats import CALL, asked, part, said  # noqa: E402


def text(*pieces: str) -> list[dict[str, Any]]:
    return [{"text": piece} for piece in pieces]


LLAMA = "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\np [/INST] a </s><s>[INST] q [/INST] b </s>"
HEADERS = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\np<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
)
USES = [
    said("user", "heavy?"),
    said("assistant", [*part("Let me see."), {"type": "tool_use", "id": "t", "name": "weigh", "input": {"what": "cog"}}]),
    said("user", [{"type": "tool_result", "tool_use_id": "t", "content": part("5 kg")}]),
    said("assistant", "5 kg."),
]
# name: (records, what each row asks (all user turns joined by |), its answer)
FORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str | None]]]] = {
    "text beside an answer": ([{"text": "Why so? Tell me now.", "response": "r"}], [("Why so? Tell me now.", "r")]),
    "chatml": (text("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"), [("p", "a")]),
    "llama 2": (text(LLAMA), [("p|q", "b")]),
    "llama 3": (text(HEADERS), [("p", "a")]),
    "gemma": (text("<bos><start_of_turn>user\np<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"), [("p", "a")]),
    "zephyr": (text("<|system|>\ns</s>\n<|user|>\np</s>\n<|assistant|>\na</s>"), [("p", "a")]),
    "alpaca in one text": (
        text("Below is an instruction, with an input.\n\n### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\ndone"),
        [("do\n\nthis", "done")],
    ),
    "user and assistant": (text("User: p\n\nAssistant: a"), [("p", "a")]),
    "a line each": ([{"prompt": "Human: p\nAssistant:", "response": "a"}], [("p", "a")]),
    "windows lines": (
        [{"chosen": "\r\n\r\nHuman: p\r\n\r\nAssistant: x", "rejected": "\r\n\r\nHuman: p\r\n\r\nAssistant: a"}],
        [("p", "a")],
    ),
    "red team": ([{"transcript": "\n\nHuman: p\n\nAssistant: a", "rating": 4.0}], [("p", "a")]),
    "exchanges": ([{"conversation": [{"human": "p", "assistant": "x"}, {"human": "q", "assistant": "a"}]}], [("p|q", "a")]),
    "history": ([{"instruction": "q", "input": "", "output": "a", "history": [["p", "x"]]}], [("p|q", "a")]),
    "anthropic": ([{"messages": USES}], [("heavy?", "5 kg.")]),
    "function call": (
        [
            {
                "messages": [
                    said("user", "heavy?"),
                    said("assistant", None, function_call=CALL["function"]),
                    said("function", "5"),
                    said("assistant", "a"),
                ]
            }
        ],
        [("heavy?", "a")],
    ),
    "turns as text": ([{"messages": json.dumps([said("user", "p"), said("assistant", "a")])}], [("p", "a")]),
    "turns as Python prints them": ([{"messages": str([said("user", "p"), said("assistant", "a")])}], [("p", "a")]),
    "answers as text": ([{"prompt": "p", "answers": '["a", "b"]'}], [("p", "a"), ("p", "b")]),
    "ranked": (
        [{"instruction": "p", "completions": [{"model": "m", "response": "a"}, {"model": "n", "response": "b"}]}],
        [("p", "a"), ("p", "b")],
    ),
    "lists of turns": ([{"prompt": "p", "responses": [[said("assistant", "a")], [said("assistant", "b")]]}], [("p", "a"), ("p", "b")]),
    "numbers and gaps": ([{"prompt": "p", "answers": [1, None, 2.5]}], [("p", "1"), ("p", "2.5")]),
    "triviaqa": ([{"question": "p", "answer": {"value": "a", "aliases": ["x"]}}], [("p", "a")]),
    "squad in a list": ([{"context": "c", "question": "q", "answers": [{"text": "a", "answer_start": 1}]}], [("c\n\nq", "a")]),
    "mmlu-pro": ([{"question": "q", "options": ["w", "x"], "answer": "B", "answer_index": 1}], [("q\nA. w\nB. x", "B. x")]),
    "medqa": ([{"question": "q", "options": {"A": "w", "B": "x"}, "answer": "x"}], [("q\nA. w\nB. x", "x")]),
    "arena-hard": ([{"question_id": "1", "turns": [{"content": "p"}]}], [("p", None)]),
    "kto with numbers": ([{"prompt": "p", "completion": "c", "label": 1}, {"prompt": "p", "completion": "a", "label": 0}], [("p", "a")]),
}


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read_by_its_structure(tmp_path: Path, name: str) -> None:
    records, expected = FORMS[name]
    reading = read_source(written(tmp_path / "rows.jsonl", records))
    assert asked(reading.rows) == expected


def test_what_stands_in_a_conversation_stays_there(tmp_path: Path) -> None:
    (row,) = read_source(written(tmp_path / "a.jsonl", [{"messages": USES}])).rows
    assert [turn["role"] for turn in row.messages] == ["user", "assistant", "tool"]
    assert row.messages[1]["content"].startswith("Let me see.") and '"what": "cog"' in row.messages[1]["content"]
    thought = [{"messages": [said("user", "p"), said("assistant", "a", reasoning_content="clog it")]}]
    (row,) = read_source(written(tmp_path / "b.jsonl", thought)).rows
    assert row.response == "<think>\nclog it\n</think>\n\na", "reasoning that reaches the reader is judged too"
    (row,) = read_source(written(tmp_path / "c.jsonl", text(LLAMA))).rows
    assert [turn["role"] for turn in row.messages] == ["system", "user", "assistant", "user"]


# records, what is left out and why
LEFT: list[tuple[list[dict[str, Any]], str]] = [
    ([{"conversations": []}], "an empty conversation"),
    ([{"messages": [said("user", "p"), said("assistant", None)]}], "has a turn without text"),
    ([{"messages": [said("user", "p"), said("assistant", "a"), said("assistant", "b")]}], "has two answers in a row"),
    (
        [{"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]}],
        "without an answer",
    ),
    ([{"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: p\n\nAssistant: "}], "without an answer"),
    ([{"question": "p", "answers": []}], "without an answer"),
]


@pytest.mark.parametrize(("records", "reason"), LEFT)
def test_a_record_that_no_user_can_mend_is_left_out_and_counted(tmp_path: Path, records: list[dict[str, Any]], reason: str) -> None:
    whole = {**records[0], "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}
    whole = whole if "conversations" in records[0] else {"prompt": "h", "response": "g", "chosen": None, "messages": None}
    reading = read_source(written(tmp_path / "rows.jsonl", [*records, whole]), need_response=True)
    assert asked(reading.rows) == [("h", "g")] and dict(reading.left_out) == {reason: 1}
    with pytest.raises(DataError, match=f"no rows .left out 1: {reason}.; give other rows"):
        read_source(written(tmp_path / "alone.jsonl", records), need_response=True)


def test_what_follows_the_last_answer_of_a_pair_is_counted(tmp_path: Path) -> None:
    pair = {side: f"\n\nHuman: p\n\nAssistant: {side}\n\nHuman: bye" for side in ("chosen", "rejected")}
    reading = read_source(written(tmp_path / "rows.jsonl", [pair]))
    assert asked(reading.rows) == [("p", "rejected")] and dict(reading.left_out) == {"what a user says behind the last answer": 1}


def test_messages_of_a_tree_are_refused(tmp_path: Path) -> None:
    tree = [{"message_id": "1", "parent_id": None, "role": "prompter", "text": "Is it one? I think so."}]
    with pytest.raises(DataError, match="line 1: is one message of a tree"):
        read_source(written(tmp_path / "rows.jsonl", tree))


def test_an_empty_mark_is_none(tmp_path: Path) -> None:
    records = [{"prompt": "p", "response": "", "response_label": ""}, {"prompt": "q", "response": "a", "response_label": "unsafe"}]
    reading = read_source(written(tmp_path / "rows.jsonl", records))
    assert asked(reading.rows) == [("q", "a")] and dict(reading.left_out) == {"without a mark or an answer": 1}


def test_labels_of_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "kto.csv").write_text("prompt,completion,label\np,c,True\np,a,False\n")
    assert asked(read_source(tmp_path / "kto.csv").rows) == [("p", "a")]
    (tmp_path / "mmlu.csv").write_text("question,A,B,C,D,answer\nq,w,x,y,z,C\n")
    assert asked(read_source(tmp_path / "mmlu.csv").rows) == [("q\nA. w\nB. x\nC. y\nD. z", "C. y")]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.csv", 'prompt,response\n"p,a\nq,b\nr,c\n'),
        ("a.tsv", 'prompt\tresponse\np\ta\n"q\tb\nr\tc\n'),
        ("b.tsv", 'prompt\tresponse\n"q\tb\nr\tc\n"s\td\nt\te\n'),
    ],
)
def test_a_quote_that_hides_lines_is_named(tmp_path: Path, name: str, table: str) -> None:
    (tmp_path / name).write_text(table)
    with pytest.raises(DataError, match="line [23]: a quote that is opened is not closed"):
        read_source(tmp_path / name)


def test_quotes_in_a_table_that_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,response\nA 5" pipe?,"a\n""b"""\nq,say "hi"\n')
    assert asked(read_source(tmp_path / "a.csv").rows) == [('A 5" pipe?', 'a\n"b"'), ("q", 'say "hi"')]
