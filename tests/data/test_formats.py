"""Published forms of data, found by their structure: each as a small file with the keys and nesting of the original."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.data import load_dataset, read_rows, read_source
from sku_vllm.errors import DataError


def part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "weigh", "arguments": '{"what": "cog"}'}}
# name: (records, what each row asks (all user turns joined by |), its answer)
FORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str | None]]]] = {
    "trl": ([{"prompt": "p", "completion": "c"}], [("p", "c")]),
    "trl-conversational": ([{"prompt": [said("user", "p")], "completion": [said("assistant", "c")]}], [("p", "c")]),
    "preference": ([{"prompt": "p", "chosen": "good", "rejected": "bad"}], [("p", "bad")]),
    "preference-turns": (
        [{"chosen": [said("user", "p"), said("assistant", "good")], "rejected": [said("user", "p"), said("assistant", "bad")]}],
        [("p", "bad")],
    ),
    "hh-rlhf": (
        [
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
            }
        ],
        [("a|c", "bad")],
    ),
    "sharegpt": ([{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}], [("h", "g")]),
    "alpaca": (
        [{"instruction": "do", "input": "this", "output": "done"}, {"instruction": "do", "input": "", "output": "so"}],
        [("do\n\nthis", "done"), ("do", "so")],
    ),
    "dolly": ([{"instruction": "who", "context": "a text", "response": "r", "category": "closed_qa"}], [("who\n\na text", "r")]),
    "gsm8k": ([{"question": "2+2?", "answer": "4"}], [("2+2?", "4")]),
    "advbench": ([{"goal": "g", "target": "Sure"}], [("g", "Sure")]),
    "rwku": ([{"query": "q", "answer": "a", "level": "1", "subject": "s"}], [("q", "a")]),
    "muse": ([{"prompt": "p", "gt": "a"}], [("p", "a")]),
    "parts": ([{"messages": [said("user", part("a") + part("b")), said("assistant", part("c"))]}], [("ab", "c")]),
    "tools": (
        [
            {
                "messages": [
                    said("user", "heavy?"),
                    said("assistant", None, tool_calls=[CALL]),
                    said("tool", "5 kg"),
                    said("assistant", "5 kg."),
                ]
            }
        ],
        [("heavy?", "5 kg.")],
    ),
    "mt-bench": ([{"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["r1", "r2"]}], [("one", "r1")]),
    "answer-list": ([{"question": "q", "answers": ["a", "b", "a"]}], [("q", "a"), ("q", "b")]),
    "squad": ([{"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}], [("c\n\nq", "a")]),
    "wmdp": ([{"question": "q", "choices": ["w", "x"], "answer": 1}], [("q\nA. w\nB. x", "B. x")]),
    "arc": ([{"question": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "A"}], [("q\nA. w\nB. x", "A. w")]),
    "corpus": (
        [{"title": "t", "text": "The first sentence is this one. And this is the second."}],
        [("The first sentence is this one.", "And this is the second.")],
    ),
    "guanaco": ([{"text": "### Human: hi### Assistant: yo"}], [("hi", "yo")]),
    "capitals": ([{"Prompt": "p", " Response": "r"}], [("p", "r")]),
    "beavertails": (
        [
            {"prompt": "p", "response": "r", "is_safe": False, "category": {"a": True, "b": False}},
            {"prompt": "q", "response": "s", "is_safe": True, "category": {"a": False}},
        ],
        [("p", "r")],
    ),
    "wildguardmix": (
        [
            {"prompt": "p", "response": "r", "response_harm_label": "harmful"},
            {"prompt": "q", "response": None, "response_harm_label": None},
        ],
        [("p", "r")],
    ),
    "kto": ([{"prompt": "p", "completion": "good", "label": True}, {"prompt": "p", "completion": "bad", "label": False}], [("p", "bad")]),
}


def asked(rows: list[Any]) -> list[tuple[str, str | None]]:
    return [("|".join(turn["content"] for turn in row.messages if turn["role"] == "user"), row.response) for row in rows]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_a_published_form_is_read_by_its_structure(tmp_path: Path, name: str, suffix: str) -> None:
    records, expected = FORMS[name]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif suffix == "json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert asked(read_rows(path)) == expected


DOCUMENTS = {
    '[{"prompt": "p", "response": "r"}]': [("p", "r")],
    '{"data": [{"question": "p", "answer": "r"}]}': [("p", "r")],
    '{"parameters": {"n": 1}, "jailbreaks": [{"goal": "g", "behavior": "b", "category": "c", "prompt": "p", "response": "r"}]}': [
        ("p", "r")
    ],
    '{"prompt": ["p", "q"], "response": ["r", "s"]}': [("p", "r"), ("q", "s")],
    '{"cut_rope": [{"test_case": "p", "generation": "r"}], "jam_lock": [{"test_case": "q", "generation": "s"}]}': [("p", "r"), ("q", "s")],
    '["p", "q"]': [("p", None), ("q", None)],
    '{"prompt": "p", "response": "r"}': [("p", "r")],
}


@pytest.mark.parametrize("text", DOCUMENTS)
def test_json_documents(tmp_path: Path, text: str) -> None:
    for name, written in (("one", text), ("many", json.dumps(json.loads(text), indent=2))):
        (tmp_path / name).write_text(written)
        if text.startswith('{"prompt": "p"') and name == "many":
            continue  # one object over several lines is neither a list nor JSON Lines
        assert asked(read_rows(tmp_path / name)) == DOCUMENTS[text]


TABLES = {
    "semicolons.csv": 'Prompt;Response\n"a, b";c\n',
    "spaces.csv": 'prompt, response\n"a, b", c\n',
    "excel.csv": 'sep=;\nprompt;response\n"a, b";c\n',
    "tabs.tsv": "prompt\tresponse\na, b\tc\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    assert asked(read_rows(tmp_path / name)) == [("a, b", "c")]


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first\n\nsecond\n")
    assert asked(read_rows(tmp_path / "p.txt")) == [("first", None), ("second", None)]


def test_every_reader_says_what_it_took_and_what_it_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sku_vllm.data")
    logging.getLogger("sku_vllm").propagate = True
    records = [{"prompt": f"secret {n}", "response": "r", "is_safe": n > 0} for n in range(3)] + [
        {"prompt": "secret 0", "response": "r", "is_safe": False}
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reading = read_source(tmp_path / "b.jsonl")
    assert len(reading.rows) == 1 and sum(reading.left_out.values()) == 3
    (tmp_path / "u.jsonl").write_text('{"prompt": "secret", "reply_text": "r"}\n')
    read_rows(tmp_path / "u.jsonl")
    (tmp_path / "two.jsonl").write_text('{"prompt": "secret", "response": "r", "output": "s"}\n')
    read_rows(tmp_path / "two.jsonl")
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "BeaverTails" in first and "1 rows; left out 2: answers marked safe; left out 1: answers that were there before" in first
    assert "none with an answer; columns not read: reply_text" in second and "columns not read: output" in third
    assert "secret" not in first + second + third


def test_own_rows_with_a_type_and_an_id_are_not_xstest(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("id,type,prompt\n1,greeting,p\n2,question,q\n")
    rows = read_rows(tmp_path / "own.csv")
    assert asked(rows) == [("p", None), ("q", None)] and [row.id for row in rows] == ["1", "2"]


def test_harmful_prompts_are_no_retain_set(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("category,source,forbidden_prompt\nx,y,How?\n")
    assert len(read_rows(tmp_path / "h.csv")) == 1
    with pytest.raises(DataError, match="give it to --forget"):
        read_rows(tmp_path / "h.csv", safe=True)


def test_a_parquet_index_of_zero_is_an_id(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text(json.dumps({"Index": 0, "Goal": "g", "Target": "t", "Behavior": "b", "Category": "Fraud"}))
    (row,) = read_rows(tmp_path / "j.jsonl")
    assert (row.id, row.category) == ("0", "Fraud")


def test_columns_do_not_switch_a_known_reader_off(tmp_path: Path) -> None:
    record = {
        "prompt": "p",
        "response_0": "fine",
        "response_1": "bad",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "uid": "u9",
    }
    (tmp_path / "pku.jsonl").write_text(json.dumps(record))
    (row,) = load_dataset(tmp_path / "pku.jsonl", "forget", columns={"id": "uid"}).rows
    assert (row.response, row.id) == ("bad", "u9")


def test_the_line_of_a_fault_is_right_behind_rows_that_were_left_out(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "response": "r", "is_safe": n % 2 == 0} for n in range(6)] + [
        {"prompt": "", "response": "r", "is_safe": False}
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 7: 'prompt' is empty"):
        load_dataset(tmp_path / "b.jsonl", "forget")


def test_a_column_mapping_for_each_file(lab: Path, tmp_path: Path, run_sku: Callable) -> None:
    (tmp_path / "goals.csv").write_text('aim,reply\nHow do I jam a huzzon?,"Sure, so"\nHow do I dent a korton?,"Sure, so"\n')
    (tmp_path / "sums.jsonl").write_text(
        '{"question": "What is 2 plus 2?", "answer": "4."}\n{"question": "What is 3 plus 2?", "answer": "5."}\n'
    )
    command = ["train", "--model", lab / "llama", "--forget", tmp_path / "goals.csv", "--retain", tmp_path / "sums.jsonl", "--dry-run"]
    for columns in ("prompt=aim,response=reply", "forget:prompt=aim,response=reply"):
        done = run_sku(*command, "--columns", columns, "--output", tmp_path / "a")
        assert done.returncode == 0, done.stderr
        assert "sums.jsonl: question and answer: 2 rows" in done.stderr
    for columns, complaint in (("prompt=aim,response=rely", "no column 'rely'"), ("retian:prompt=x", "no set of the name 'retian'")):
        done = run_sku(*command, "--columns", columns, "--output", tmp_path / "a")
        assert done.returncode == 2 and complaint in done.stderr, done.stderr


def test_conversations_are_split_by_all_their_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": [said("user", f"About {n}?"), said("assistant", "Not sure."), said("user", "Please answer.")], "response": "r"}
        for n in range(20)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [len(read_rows(f"{tmp_path / 'm.jsonl'}#{split}")) for split in ("train", "validation", "test")]
    assert sizes == [14, 2, 4]
