"""Opens a file of rows, whatever its format, and gives its records one by one with their line or row number.

JSONL, a JSON array (or an object that holds one), CSV, TSV, Parquet, text with a prompt a line, each perhaps gzipped, a directory
written by `datasets.save_to_disk`, `hf://` names of the hub (`hub.py`), and patterns (`data/part-*.jsonl`), whose files are one set.
Open this file to add a file format.
"""

import glob
import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sku_vllm.data.conversation import are_turns
from sku_vllm.data.file_kinds import PARQUET, first_bytes
from sku_vllm.data.hub import HUB, hub_dataset, saved_dataset
from sku_vllm.data.json_document import document_records, loads, rows_inside
from sku_vllm.data.tables import parquet_records, table_records
from sku_vllm.errors import DataError

Numbered = Iterator[tuple[int, dict[str, Any]]]
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one source, to be read once.

    name: how messages and records call the source (a hub set by its revision). unit: "line" or "row", what the numbers count.
    split: what is still to be taken of it, None for all. total: how many records there are, None where that is not known.
    header: lines before the first record. files: how many files a pattern stands for, 0 where the source is none.
    begun: of a pattern, for each file that was begun the last number before it, what its own numbers are shifted by, and its records.
    """

    name: str
    unit: str
    numbered: Numbered
    split: str | None = None
    total: int | None = None
    header: int = 0
    files: int = 0
    begun: list[tuple[int, int, "Records"]] = field(default_factory=list)

    def place(self, number: int) -> str:
        """Where a record stands: "FILE line 3"."""
        for before, shift, part in reversed(self.begun):
            if number > before:
                return part.place(number - shift)
        return f"{self.name} {self.unit} {number}"


def open_records(source: str | Path) -> Records:
    """The records of `PATH`, `PATH#SPLIT` or `hf://ORG/NAME[@REVISION][:CONFIG][#SPLIT]`. PATH may be a pattern (`*`, `?`, `[`).

    Raises:
        DataError: there is no such file; also while it is read, with the line.
    """
    if str(source).startswith(HUB):
        name, dataset, split = hub_dataset(str(source))
        return Records(name, "row", enumerate(dataset, 1), split, len(dataset))
    path, split = split_name(source)
    if files := _matching(path):
        return _one_set(str(path), [_file_records(file, None) for file in files], split)
    if not path.exists():
        raise DataError(f"{path}: no " + ("file matches this pattern" if glob.has_magic(str(path)) else "such file"))
    if path.is_dir():
        dataset, split = saved_dataset(path, split)
        return Records(str(path), "row", enumerate(dataset, 1), split, len(dataset))
    return _file_records(path, split)


def _file_records(path: Path, split: str | None) -> Records:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    begin = first_bytes(path)
    if kind in (".csv", ".tsv"):
        return Records(str(path), "line", _readable(path, table_records(path, opened, kind == ".tsv")), split, header=1)
    if kind == ".parquet" or begin.startswith(PARQUET):
        return Records(str(path), "row", parquet_records(path), split)
    if kind == ".txt":
        return Records(str(path), "line", _readable(path, _prompts(path)), split)
    with opened(path) as file:
        line, more = _first_line(file), bool(_first_line(file))
    # A part of JSON Lines may hold one record, which is one all the same where the file's name says so.
    if line.startswith(("{", "[")) and not _is_record(line, more or (kind in LINES and line.startswith("{"))):
        return Records(str(path), "row", _readable(path, _json_document(path)), split)
    return Records(str(path), "line", _readable(path, _json_lines(path)), split)


def split_name(source: str | Path) -> tuple[Path, str | None]:
    """Path and split of `PATH#SPLIT`; a file (or files that match a pattern) whose name has a `#` comes first."""
    text = str(source)
    if "#" in text and not os.path.exists(text) and not _matching(Path(text)):
        text, _, split = text.rpartition("#")
        return Path(text), split
    return Path(text), None


def _matching(path: Path) -> list[Path]:
    """The files that a pattern stands for, sorted; none where a file or directory has exactly this name."""
    if not glob.has_magic(str(path)) or path.exists():
        return []
    return [Path(name) for name in sorted(glob.glob(str(path))) if os.path.isfile(name)]


def _one_set(pattern: str, parts: list[Records], split: str | None) -> Records:
    """The records of several files, numbered on as if they stood in one: identities made of a number are then those of one file."""
    begun: list[tuple[int, int, Records]] = []

    def numbered() -> Numbered:
        last = 0
        for part in parts:
            shift = last - part.header if last else 0  # a table's header stands in every file, but would once in one
            begun.append((last, shift, part))
            for number, record in part.numbered:
                last = number + shift
                yield last, record

    return Records(pattern, "row", numbered(), split, files=len(parts), begun=begun)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", object) of every line that is not blank; a byte order mark and Windows line ends are accepted.

    Raises:
        DataError: with the line.
    """
    for number, record in _readable(path, _json_lines(path)):
        yield f"{path} line {number}", record


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """A file as text, unzipped where it is gzipped; UTF-8 with or without a byte order mark, line ends as they are."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        inner = gzip.GzipFile(fileobj=raw) if zipped else raw
        with io.TextIOWrapper(inner, encoding="utf-8-sig", newline="") as file:  # type: ignore[arg-type]
            yield file


def _readable(path: Path, records: Numbered) -> Numbered:
    """The records, with what goes wrong with the file itself as DataError."""
    try:
        yield from records
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a readable gzip file ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the file and its permissions") from error


def _first_line(file: IO[str]) -> str:
    try:
        return next((line for line in file if line.strip()), "").lstrip()
    except (UnicodeDecodeError, OSError, EOFError):
        return ""  # the reader below says what is wrong


def _is_record(line: str, more: bool) -> bool:
    """Whether a first line that begins with `{` or `[` is a record of JSON Lines, and not the begin of a document, or all of one.

    more: other lines follow.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith("{") and not line.rstrip().endswith(("{", "[", ","))
    return more or (isinstance(value, dict) and rows_inside(value, "") is None)


def _json_lines(path: Path) -> Numbered:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, f"{path} line {number}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but no text: encoding raises
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line has to be one JSON object") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable as text ({error}); write the line again") from error
    if isinstance(value, dict):
        return value
    if are_turns(value):
        return {"messages": value}
    raise DataError(f"{where}: {type(value).__name__} instead of a JSON object with 'prompt' and 'response'; write each line as an object")


def _json_document(path: Path) -> Numbered:
    with opened(path) as file:
        text = file.read()
    yield from document_records(text, str(path))


def _prompts(path: Path) -> Numbered:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"prompt": line.strip()}
