"""Patterns: a set that lies in several files is one set, however its rows are cut into them."""

import csv
import gzip
import io
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku_vllm.data import read_rows, read_source
from sku_vllm.data.readers import SPLITS
from sku_vllm.data.rows import rows_digest
from sku_vllm.errors import DataError
from sku_vllm.evaluate.judge_file import judge_file

Records = Sequence[dict[str, Any]]
WORDS = st.integers(0, 30)
OWN = st.builds(lambda n, k: {"prompt": f"How do I jam cog {n}?", "response": f"Jam it {'so' if k % 3 else 'sorry, no'}."}, WORDS, WORDS)
# Its prompts and answers are taken once, and rows are known by their number.
PKU = st.builds(
    lambda n, k, safe: {
        "prompt": f"p{n}",
        "response_0": f"a{k}",
        "response_1": "b",
        "is_response_0_safe": safe,
        "is_response_1_safe": not safe,
    },
    *(WORDS, WORDS, st.booleans()),
)
STRONGREJECT = st.builds(lambda n, k: {"category": f"c{k % 3}", "source": "s", "forbidden_prompt": f"How\ndo I jam cog {n}?"}, WORDS, WORDS)
SETS = st.one_of(*(st.lists(kind, min_size=1, max_size=40) for kind in (OWN, PKU, STRONGREJECT)))
CUTS = st.lists(st.integers(0, 40), max_size=4).map(sorted)


def lines(records: Records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(records: Records, names: Sequence[str], separator: str) -> str:
    with io.StringIO(newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=separator)
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()


def write(path: Path, records: Records, names: Sequence[str]) -> None:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({name: [record[name] for record in records] for name in names}), path)
        return
    kind = path.suffixes[0]
    text = {".jsonl": lines(records), ".json": json.dumps(records)}.get(kind) or (
        table(records, names, ";" if kind == ".csv" else "\t") if kind in (".csv", ".tsv") else ""
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def cut(folder: Path, records: Records, cuts: Sequence[int], suffix: str) -> tuple[Path, str]:
    """The rows as one file, and a pattern of the files that they are cut into; some of these may be empty."""
    write(folder / f"whole{suffix}", records, [*records[0]])
    for number, (low, high) in enumerate(zip([0, *cuts], [*cuts, len(records)], strict=True)):
        write(folder / f"part-{number}{suffix}", records[low : max(low, high)], [*records[0]])
    return folder / f"whole{suffix}", str(folder / f"part-*{suffix}")


def taken(source: str | Path, **how: Any) -> tuple[Any, ...]:
    """What a reader takes, or that it takes nothing."""
    try:
        reading = read_source(source, keep=True, **how)
    except DataError:
        return ()
    return reading.form, rows_digest(reading.rows), reading.rows, reading.origins, reading.left_out, reading.unread


@given(SETS, CUTS, st.sampled_from((".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet")))
@settings(max_examples=150, deadline=None)
def test_how_rows_are_cut_into_files_changes_no_row_nor_digest_nor_split(records: Records, cuts: list[int], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, pattern = cut(Path(folder), records, cuts, suffix)
        for safe in (False, True, None):
            assert taken(pattern, safe=safe) == taken(whole, safe=safe)
        for split in SPLITS:
            assert taken(f"{pattern}#{split}") == taken(f"{whole}#{split}")


@given(st.lists(OWN, min_size=1, max_size=30), CUTS)
@settings(max_examples=30, deadline=None)
def test_how_rows_are_cut_into_files_changes_no_verdict_rate_nor_interval(records: Records, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lexicon.json").write_text('["jam it so"]')
        sources = cut(Path(folder), records, cuts, ".jsonl")
        judge = [f"lexicon:{folder}/lexicon.json"]
        one, many = (judge_file(judge, str(source), f"{folder}/{n}") for n, source in enumerate(sources))
        assert one == many and one["harmful_low"] <= one["harmful"] <= one["harmful_high"]
        assert (Path(folder) / "0").read_bytes() == (Path(folder) / "1").read_bytes()


def test_one_record_of_turns_alone_in_its_part_is_no_list_of_rows(tmp_path: Path) -> None:
    records = [{"Conversations": [{"from": "human", "value": f"h{n}"}, {"from": "gpt", "value": "g"}]} for n in range(3)]
    whole, pattern = cut(tmp_path, records, [2], ".jsonl")
    assert len(read_rows(whole)) == 3 and read_rows(pattern) == read_rows(whole)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What readers say."""
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger("sku_vllm.data"), "info", found.append)
    return found


def test_files_of_several_formats_are_one_set_with_one_mapping(tmp_path: Path, said: list[str]) -> None:
    for number, suffix in enumerate((".jsonl", ".csv", ".json.gz")):
        write(tmp_path / f"part-{number}{suffix}", [{"ask": f"p{number}", "reply": "r"}], ["ask", "reply"])
    (tmp_path / "part-4").mkdir()
    rows = read_rows(tmp_path / "part-*", columns={"prompt": "ask", "response": "reply"})
    assert [(row.prompt, row.response) for row in rows] == [("p0", "r"), ("p1", "r"), ("p2", "r")]
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}/part-* (3 files): prompt and response: 3 rows")


def test_a_fault_is_named_by_the_file_and_its_own_line(tmp_path: Path) -> None:
    for number, suffix in enumerate((".jsonl", ".csv", ".csv", ".jsonl")):
        records = [{"prompt": "p", "response": "r"}] * 2 + [{"prompt": "p", "response": "" if number == 2 else "r"}]
        write(tmp_path / f"part-{number}{suffix}", records, ["prompt", "response"])
    with pytest.raises(DataError, match=r"part-2\.csv line 4: no 'response'"):
        read_rows(tmp_path / "part-?.*", need_response=True)


def test_a_file_of_exactly_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(lines([{"prompt": "brackets"}]))
    (tmp_path / "a1.jsonl").write_text(lines([{"prompt": "one"}]))
    (tmp_path / "b#1.jsonl").write_text(lines([{"prompt": f"p{n}"} for n in range(10)]))
    assert [row.prompt for row in read_rows(tmp_path / "a[1].jsonl")] == ["brackets"]
    assert [row.prompt for row in read_rows(tmp_path / "a[12].jsonl")] == ["one"]
    assert len(read_rows(tmp_path / "b#?.jsonl")) == 10 and len(read_rows(f"{tmp_path}/b#?.jsonl#train")) == 7


def test_commands_take_patterns(lab: Path, tmp_path: Path, run_sku: Callable) -> None:
    for name in ("forget", "retain", "border"):
        file = lab / ("forget" if name == "forget" else "retain") / "train.jsonl"
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:12]]
        cut(tmp_path, records, [3, 7], f"-{name}.jsonl")
    sets = [part for name in ("forget", "retain", "border") for part in (f"--{name}", f"{tmp_path}/part-*-{name}.jsonl")]
    how = ["--method", "task-vector", "--steps", 1, "--batch-size", 2]
    done = run_sku("train", "--model", lab / "llama", *sets, *how, "--output", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(".jsonl (3 files): ") == 3 and done.stderr.count(": 12 rows") == 3
    digests = []
    for source in ("whole", "part-*"):
        named = ["--forget", f"unseen={tmp_path}/{source}-forget.jsonl", "--border", f"near={tmp_path}/{source}-border.jsonl"]
        asked = [*named, "--retain", f"{tmp_path}/{source}-retain.jsonl#train", "--judge", "refusal", "--samples", 0]
        output = tmp_path / f"measured-{len(digests)}"
        done = run_sku("eval", "--model", lab / "llama", *asked, "--max-new-tokens", 4, "--output", output)
        assert done.returncode == 0, done.stderr
        record = json.loads((output / "sku_eval.json").read_text())
        digests.append((record["row_digests"], record["forget"], (output / "rows.jsonl").read_bytes()))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("command", ["eval --model m --judge refusal --retain r --forget u={}", "judge --judge refusal --input {}"])
def test_a_pattern_that_no_file_matches(tmp_path: Path, run_sku: Callable, command: str) -> None:
    done = run_sku(*command.format(f"{tmp_path}/no-*.jsonl#test").split(), "--output", tmp_path / "output")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"{tmp_path}/no-*.jsonl: no file matches this pattern" in done.stderr
