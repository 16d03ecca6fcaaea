"""Lists and objects that a file holds as text, as tables do, and files that are written in other ways than their names say."""

import json
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.data import Row, read_source
from sku_vllm.data.written import written_value
from sku_vllm.errors import DataError


def rows_of(path: Path, text: str | bytes, **more: Any) -> list[Row]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_source(path, **more).rows


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("""['say "hi"' "it's"]""", ['say "hi"', "it's"]),
        ("[{'role': 'user'}\n {'role': 'x'}]", [{"role": "user"}, {"role": "x"}]),
        ("{'text': array(['a (b)', 'c, dtype=x)'], dtype=object), 'n': array([1])}", {"text": ["a (b)", "c, dtype=x)"], "n": [1]}),
        ("[INST] p [/INST]", None),
        ("[1 2 3]", None),
        ("[]", None),
        ("plain", None),
        ("['broken", None),
    ],
)
def test_a_value_is_read_as_json_python_and_numpy_print_it(text: str, value: Any) -> None:
    assert written_value(text) == value


CHOICES = ["['w', 'x']", '["w", "x"]', "['w' 'x']"]


@pytest.mark.parametrize("choices", CHOICES)
def test_choices_of_a_table_are_part_of_the_prompt(tmp_path: Path, choices: str) -> None:
    """Their number alone must not become the answer."""
    (row,) = rows_of(tmp_path / "wmdp.csv", f"question,choices,answer\nq,{quoted(choices)},1\n")
    assert (row.prompt, row.response) == ("q\nA. w\nB. x", "B. x")


def test_choices_that_are_no_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: 'choices' is a text.*write a list"):
        rows_of(tmp_path / "wmdp.csv", "question,choices,answer\nq,w or x,1\n")
    with pytest.raises(DataError, match="'answer' is '7', none of the choices; write its letter"):
        rows_of(tmp_path / "w.csv", f"question,choices,answer\nq,{quoted(CHOICES[0])},7\n")


def test_other_lists_of_a_table(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "mt.csv", f"question_id,turns\n1,{quoted(str(['one', 'two']))}\n")
    assert row.prompt == "one"
    squad = "{'text': array(['a'], dtype=object), 'answer_start': array([3], dtype=int32)}"
    (row,) = rows_of(tmp_path / "squad.csv", f"question,answers\nq,{quoted(squad)}\n")
    assert row.response == "a"
    table = f"prompt,response,must_contain,category\np,r,{quoted(str(['a', 'b']))},{quoted(str({'x': True, 'y': False}))}\n"
    (row,) = rows_of(tmp_path / "own.csv", table)
    assert (row.must_contain, row.category) == (("a", "b"), "x")
    turns = {side: [{"role": "user", "content": "p"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (row,) = rows_of(tmp_path / "pair.csv", "chosen,rejected\n" + ",".join(quoted(str(side)) for side in turns.values()))
    assert (row.prompt, row.response) == ("p", "rejected")
    numpy = "[{'role': 'user', 'content': 'p'}\n {'role': 'assistant', 'content': 'a'}]"
    (row,) = rows_of(tmp_path / "turns.csv", f"messages\n{quoted(numpy)}\n")
    assert (row.prompt, row.response) == ("p", "a")


def test_a_text_that_looks_like_a_list_stays_one(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Print [1, 2].", "response": "[1, 2]", "must_contain": "['a']"},
        {"prompt": "['a', 'b']", "response": '{"a": 1}', "answers": "[1]"},
    ]
    rows = rows_of(tmp_path / "own.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [(row.prompt, row.response) for row in rows] == [("Print [1, 2].", "[1, 2]"), ("['a', 'b']", '{"a": 1}')]
    assert rows[0].must_contain == ("['a']",)


ROW = {"prompt": "p", "response": "r"}
OTHER = {"prompt": "q", "response": "s"}
BOTH = [("p", "r"), ("q", "s")]
# name: (text, prompts and answers)
DOCUMENTS: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "nested lists": (json.dumps([[ROW], [OTHER]]), BOTH),
    "lists of turns": (json.dumps([[{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]]), BOTH[:1]),
    "a list of turns a line": (2 * (json.dumps([{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]) + "\n"), BOTH[:1] * 2),
    "objects in a row": (json.dumps(ROW, indent=2) + "\n" + json.dumps(OTHER, indent=2), BOTH),
    "one object over lines": (json.dumps(ROW, indent=2), BOTH[:1]),
    "rows under ids": (json.dumps({"a": ROW, "b": OTHER}), BOTH),
    "columns of pandas": (json.dumps({"prompt": {"0": "p", "1": "q"}, "response": {"0": "r", "1": "s"}}), BOTH),
    "test cases of HarmBench": (json.dumps({"jam": ["p", "q"], "cut": ["z"]}), [("p", None), ("q", None), ("z", None)]),
    "one test case a behaviour": (json.dumps({"jam": ["p"], "cut": ["q"]}), [("p", None), ("q", None)]),
    "nothing in pandas": ('{"prompt": "p", "response": NaN}\n{"prompt": "q", "response": "s"}', [("p", None), ("q", "s")]),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_ways_to_write_rows_as_json(tmp_path: Path, name: str, suffix: str, mark: bytes) -> None:
    text, expected = DOCUMENTS[name]
    if suffix == ".jsonl" and name in ("rows under ids", "columns of pandas", "test cases of HarmBench", "one test case a behaviour"):
        return  # there one object on one line is one row
    rows = rows_of(tmp_path / f"rows{suffix}", mark + text.replace("\n", "\r\n").encode())
    assert [(row.prompt, row.response) for row in rows] == expected


def test_a_row_of_objects_is_no_table_of_pandas(tmp_path: Path) -> None:
    pair = {side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")}
    (row,) = rows_of(tmp_path / "pair.json", json.dumps({"prompt": [{"role": "user", "content": "p"}], **pair}))
    assert (row.prompt, row.response) == ("p", "rejected")


def test_splits_in_one_document_are_not_one_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds the splits train, test.*a file of its own"):
        rows_of(tmp_path / "both.json", json.dumps({"train": [ROW], "test": [OTHER]}))


@pytest.mark.parametrize(
    ("name", "begin", "told"),
    [
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("rows.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("rows.xlsx", b"PK\x03\x04", "save the sheet as CSV"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd -d"),
        ("rows.csv", b"<!DOCTYPE html><html>", "download the file itself"),
    ],
)
def test_a_file_of_another_kind_is_called_that(tmp_path: Path, name: str, begin: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        rows_of(tmp_path / name, begin)


def test_names_and_rows_of_a_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: two columns have the name 'response'; rename"):
        rows_of(tmp_path / "a.csv", "prompt,response,response\np,r,s\n")
    assert len(rows_of(tmp_path / "b.csv", ",prompt,,\n0,p,,\n")) == 1, "columns without a name may be several"
    (tmp_path / "d.csv").write_text("prompt,response\np,r\n,\n , \n")
    reading = read_source(tmp_path / "d.csv")
    assert len(reading.rows) == 1 and dict(reading.left_out) == {"an empty row": 2}


def test_an_error_names_the_columns_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no 'prompt'.*--columns.*it has who, what"):
        rows_of(tmp_path / "a.jsonl", '{"who": "a", "what": "b"}')
