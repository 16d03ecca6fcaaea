"""Rows from JSONL, CSV, Parquet or a saved Hugging Face dataset; PKU-SafeRLHF and TruthfulQA known by their columns.

`PATH#train`, `#validation` and `#test` take 70, 10 and 20 % of the PROMPTS (or a split of that name from a saved
DatasetDict). The cut sorts prompts by their digest, so a question never sits on two sides and no seed has to agree
between commands.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sku_vllm.data.rows import Row, row_from
from sku_vllm.errors import DataError

SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
FIELDS = ("prompt", "messages", "response", "must_contain", "id")
Records = Iterator[tuple[str, dict[str, Any]]]


def read_rows(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    need_response: bool = False,
    safe: bool = False,
) -> list[Row]:
    """Every row of a file, in order.

    Args:
        path: JSONL, CSV, Parquet, or a directory written by `datasets.save_to_disk`; `#SPLIT` may follow.
        columns: our field name → the file's column name.
        need_response: refuse rows without an answer.
        safe: of PKU-SafeRLHF rows take the safe answers instead of the unsafe ones (a retain set).

    Raises:
        DataError: with file and line (or row) number, and what to do.
    """
    path, split = _split_name(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file")
    unknown = set(columns or ()) - set(FIELDS)
    if unknown:
        raise DataError(f"--columns: unknown field {sorted(unknown)[0]!r}; choose from {', '.join(FIELDS)}")
    records, split = _records(path, split)
    rows = list(_rows(path, records, columns or {}, safe))
    if not rows:
        raise DataError(f"{path}: no rows")
    for row, (where, _) in zip(rows, records, strict=False) if need_response else ():
        if row.response is None or not row.response.strip():
            raise DataError(f"{where}: no 'response'; training needs an answer for every prompt")
    return rows if split is None else take_split(rows, split, str(path))


def take_split(rows: Sequence[Row], split: str, name: str) -> list[Row]:
    """The rows whose prompt falls in `split` of SPLITS.

    Raises:
        DataError: an unknown split, or one that is empty.
    """
    if split not in SPLITS:
        raise DataError(f"{name}#{split}: unknown split; choose from {', '.join(SPLITS)}")
    prompts = sorted({row.prompt for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    low, high = (round(edge * len(prompts)) for edge in SPLITS[split])
    chosen = set(prompts[low:high])
    kept = [row for row in rows if row.prompt in chosen]
    if not kept:
        raise DataError(f"{name}#{split}: empty; the file has only {len(prompts)} different prompts")
    return kept


def _split_name(path: str | Path) -> tuple[Path, str | None]:
    text = str(path)
    if "#" in text and not os.path.exists(text):
        text, _, split = text.rpartition("#")
        return Path(text), split
    return Path(text), None


def _records(path: Path, split: str | None) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """(where, record) pairs, and the split that is still to be taken."""
    if path.is_dir():
        return _saved_dataset(path, split)
    reader = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), json_lines)
    try:
        return list(reader(path)), split
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the file and its permissions") from error


def json_lines(path: Path) -> Records:
    """("FILE line N", object) of every line that is not blank; a byte order mark and Windows line ends are no matter.

    Raises:
        DataError: with the line.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", _json_object(line, f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason}); expected JSON Lines, .csv or .parquet") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text a tokenizer takes
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line has to be one JSON object") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable as text ({error}); write the line again") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {type(value).__name__} instead of a JSON object with 'prompt' and 'response'")
    return value


def _csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the 128 KiB that csv grants a field
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                where = f"{path} line {reader.line_num}"
                if None in record:  # DictReader's key for what no column is left for
                    raise DataError(f"{where}: has more fields than the header; put quotes around a text that has commas")
                yield where, {key: value or None for key, value in record.items()}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the table as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'sku-vllm[data]'") from error
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{path} row {number}", record


def _saved_dataset(path: Path, split: str | None) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: reading a saved dataset needs `datasets`; pip install 'sku-vllm[data]'") from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # the last two where its JSON lacks or mistypes something
        raise DataError(f"{path}: not a directory written by datasets.save_to_disk") from error
    if isinstance(dataset, datasets.DatasetDict):
        chosen = "train" if split is None else split
        if chosen not in dataset:
            raise DataError(f"{path}: no split {chosen!r}; name one as {path}#{next(iter(dataset))}")
        dataset, split = dataset[chosen], None
    return [(f"{path} row {number}", record) for number, record in enumerate(dataset, 1)], split


def _rows(path: Path, records: list[tuple[str, dict[str, Any]]], columns: Mapping[str, str], safe: bool) -> Iterator[Row]:
    from sku_vllm.data import known

    names = set().union(*(record for _, record in records[:100])) if records else set()
    missing = [name for name in columns.values() if name not in names]
    if missing and records:
        raise DataError(f"{path}: no column {missing[0]!r} (--columns); it has {', '.join(sorted(map(str, names)))}")
    reader = None if columns else known.reader_for(names)
    if reader is not None:
        yield from reader(path, records, safe)
        return
    for where, record in records:
        yield row_from({**record, **{field: record.get(name) for field, name in columns.items()}}, where)
