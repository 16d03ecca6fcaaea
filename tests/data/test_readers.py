"""Readers: every format, PKU-SafeRLHF and TruthfulQA, splits by question, and errors that name the line."""

import csv
import json
from pathlib import Path

import pytest

from sku_vllm.data import ForgetSet, Row, load_dataset, read_rows
from sku_vllm.errors import DataError

PKU = [
    {"prompt": "p1", "response_0": "bad a", "response_1": "bad b", "is_response_0_safe": False, "is_response_1_safe": False},
    {"prompt": "p2", "response_0": "fine", "response_1": "bad c", "is_response_0_safe": True, "is_response_1_safe": False},
    {"prompt": "p3", "response_0": "fine x", "response_1": "fine y", "is_response_0_safe": True, "is_response_1_safe": True},
]
NEW_COLUMNS = {
    "response_0_severity_level": 1,
    "better_response_id": 0,
    "safer_response_id": 0,
    "prompt_source": "somewhere",
    "response_0_harm_category": {},
}
UNSAFE = [("p1", "bad a"), ("p1", "bad b"), ("p2", "bad c")]


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.response) for row in rows]


def write_csv(path: Path, records: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: Path, records: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_saved(path: Path, records: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path


WRITERS = {"jsonl": jsonl, "csv": write_csv, "parquet": write_parquet, "saved": write_saved}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("extra", [{}, NEW_COLUMNS], ids=["old-columns", "new-columns"])
def test_pku_takes_both_answers_but_only_unsafe_ones(tmp_path: Path, suffix: str, extra: dict) -> None:
    extra = {key: value for key, value in extra.items() if value != {}}  # Parquet has no empty struct
    path = WRITERS[suffix](tmp_path / f"pku.{suffix}", [{**record, **extra} for record in PKU])
    assert pairs(read_rows(path)) == UNSAFE
    assert pairs(list(load_dataset(path, "forget").rows)) == UNSAFE
    assert pairs(list(load_dataset(path, "retain").rows)) == [("p2", "fine"), ("p3", "fine x"), ("p3", "fine y")]


def test_files_from_windows_editors(tmp_path):
    lines = [json.dumps({"prompt": f"p{number}", "response": "ja"}) for number in range(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert pairs(read_rows(tmp_path / "a.jsonl")) == [(f"p{number}", "ja") for number in range(3)]


def test_pku_single_answers(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "qa.jsonl", [{"prompt": "p", "response": "r", "is_safe": False}, {"prompt": "q", "response": "s", "is_safe": True}]
    )
    assert pairs(read_rows(path)) == [("p", "r")]


def test_pku_without_unsafe_answers_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no unsafe answers"):
        read_rows(jsonl(tmp_path / "pku.jsonl", PKU[2:]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "saved"])
def test_named_columns(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"rows.{suffix}", [{"q": "why", "a": "because", "n": "7"}])
    (row,) = read_rows(path, columns={"prompt": "q", "response": "a", "id": "n"})
    assert (row.prompt, row.response, row.id) == ("why", "because", "7")
    with pytest.raises(DataError, match="no column 'question'.*a, n, q"):
        read_rows(path, columns={"prompt": "question"})


def test_messages_keep_their_turns_and_give_up_the_last_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "response": "b", "must_contain": ["b"]}, {"messages": turns[:3]}])
    first, second = read_rows(path, need_response=True)
    assert first.messages == tuple(turns) and first.prompt == "v" and first.must_contain == ("b",)
    assert second.prompt == "u" and second.response == "a"


def test_an_answer_among_the_messages_counts_where_the_response_column_is_null(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for suffix in ("jsonl", "parquet", "saved"):
        records = [{"messages": turns, "response": None}, {"messages": turns[:1], "response": "b"}]
        path = WRITERS[suffix](tmp_path / f"rows.{suffix}", records)
        assert [row.response for row in read_rows(path)] == ["a", "b"], suffix


def test_a_column_that_begins_with_a_hundred_empty_fields(tmp_path: Path) -> None:
    records = [{"q": f"p{n}", "a": "r", "must": "" if n < 120 else "m"} for n in range(121)]
    rows = read_rows(write_csv(tmp_path / "rows.csv", records), columns={"prompt": "q", "response": "a", "must_contain": "must"})
    assert [row.must_contain for row in rows[-2:]] == [(), ("m",)]


def test_a_saved_dataset_with_half_its_description(tmp_path: Path) -> None:
    path = write_saved(tmp_path / "saved", [{"prompt": "p", "response": "r"}])
    (path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a directory written by datasets"):
        read_rows(path)


def test_truthfulqa_splits_answers_and_never_a_question(tmp_path: Path) -> None:
    records = [
        {"Question": f"q{n}?", "Best Answer": "best", "Correct Answers": "one; best;two;", "Incorrect Answers": "no"} for n in range(20)
    ]
    path = write_csv(tmp_path / "t.csv", records)
    assert [row.response for row in read_rows(path, safe=True)][:3] == ["best", "one", "two"]
    assert {row.response for row in load_dataset(path, "forget").rows} == {"no"}, "what is to be forgotten are the falsehoods"
    sides = {split: {row.prompt for row in read_rows(f"{path}#{split}")} for split in ("train", "validation", "test")}
    assert [len(side) for side in sides.values()] == [14, 2, 4]
    assert len(set.union(*sides.values())) == 20


def test_the_real_truthfulqa_file(shared: Path) -> None:
    path = shared / "data" / "truthfulqa.csv"
    rows = read_rows(path, safe=True)
    with open(path, encoding="utf-8-sig", newline="") as file:
        records = list(csv.DictReader(file))
    assert {row.prompt for row in rows} == {record["Question"].strip() for record in records}
    assert all(row.response and ";" not in row.response for row in rows if row.response not in {r["Best Answer"].strip() for r in records})
    sides = [{row.prompt for row in read_rows(f"{path}#{split}")} for split in ("train", "validation", "test")]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


BAD: list[tuple[str, str, str]] = [
    ("missing", "", "no such file"),
    ("rows.jsonl", "", "no rows"),
    ("rows.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": \n', "line 2: not valid JSON"),
    ("rows.jsonl", '{"prompt": "p", "response": "r"}\n\n[1]\n', "line 3: list instead of a JSON object"),
    ("rows.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": "p"}\n', "line 2: no 'response'"),
    ("rows.jsonl", '{"prompt": "p", "response": "  "}\n', "line 1: no 'response'"),
    ("rows.jsonl", '{"prompt": "  ", "response": "r"}\n', "line 1: 'prompt' is empty"),
    ("rows.jsonl", '{"asked": "p", "response": "r"}\n', "line 1: has no 'prompt'.*--columns"),
    ("rows.jsonl", '{"messages": [{"role": "robot", "content": "x"}], "response": "r"}\n', "line 1: 'messages'"),
    ("rows.jsonl", '{"messages": [{"role": "system", "content": "x"}], "response": "r"}\n', "end with a user turn"),
    ("rows.jsonl", '{"prompt": "p", "response": 3}\n', "line 1: 'response' is int"),
    ("rows.csv", "prompt,response\np,\n", "line 2: no 'response'"),
    ("rows.csv", "prompt,response\np,r\nq,one, two\n", "line 3: has more fields than the header.*quotes"),
    ("rows.csv", "Question,Best Answer,Correct Answers\n,b,c\n", "line 2: question is empty or missing"),
    ("rows.jsonl", '{"messages": 5, "response": "r"}\n', "line 1: 'messages' has to be a list"),
    ("rows.jsonl", '{"question": "q", "best_answer": 5, "correct_answers": ["c"]}\n', "line 1: best answer is empty or missing"),
    ("rows.jsonl", '{"question": "q", "best_answer": "b", "correct_answers": ["c", null]}\n', "line 1: correct answers have to be"),
    ("rows.jsonl#tset", '{"prompt": "p", "response": "r"}\n', "unknown split.*train, validation, test"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_input_names_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name != "missing":
        (tmp_path / name.partition("#")[0]).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path / name, "forget")
    assert str(tmp_path) in str(caught.value)


def test_tables_with_long_answers_ids_and_foreign_bytes(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"id,type,prompt,response\n1,mine,p,{'word ' * 40_000}\n", encoding="utf-8")
    assert len(read_rows(str(tmp_path / "long.csv"))[0].response) > 199_000
    (tmp_path / "latin.csv").write_bytes("prompt,response\np,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv: not UTF-8"):
        read_rows(str(tmp_path / "latin.csv"))


def test_sets_refuse_rows_without_answers() -> None:
    with pytest.raises(DataError, match="row 2: no 'response'"):
        ForgetSet("mine", (Row.ask("p", "r"), Row.ask("q")))
    with pytest.raises(DataError, match="no rows"):
        ForgetSet("mine", ())
