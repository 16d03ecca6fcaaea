"""Reads rows from any file that `files.py` opens, says what it recognised, and takes a split of them.

`PATH#train`, `#validation` and `#test` take 70, 10 and 20 % of the CONVERSATIONS (or a split of that name from a saved
DatasetDict). They are sorted by their sha256 and cut there, so that a conversation is never in two splits and commands
need no common seed.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sku_vllm.data.columns import FileColumns, normal
from sku_vllm.data.conversation import HELP
from sku_vllm.data.files import Records, open_records
from sku_vllm.data.forms import LACKING, NO_PROMPT, generic_rows, recognise
from sku_vllm.data.known import known_set
from sku_vllm.data.reading_bar import reading_bar
from sku_vllm.data.rows import BadRow, LeftOut, Row
from sku_vllm.data.written import decoded
from sku_vllm.errors import DataError

SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
SAMPLE = 100  # records whose columns tell the form of a file
SIDES = ("answers marked", "answers labelled", "safe prompts", "unsafe prompts")  # what is left out since the other set takes it
FEW = 20  # as many columns that were not read are named
logger = logging.getLogger("sku_vllm.data")
_held: ContextVar[list[str] | None] = ContextVar("held", default=None)


@dataclass(slots=True)
class Reading:
    """What was read from one source.

    Attributes:
        name: the source; a hub set with its commit. files: how many files a pattern stands for, 0 where the source is none.
        form: what it was recognised as. rows: in the order of the file.
        origins: for every row its record as it stands in the file (only where `keep` was asked for).
        left_out: how many rows or records were passed over, by reason. unread: columns that were not read.
    """

    name: str
    form: str
    rows: list[Row] = field(default_factory=list)
    origins: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)
    files: int = 0

    def text(self) -> str:
        """One line for a log; it names columns and counts, no content."""
        answered = sum(row.response is not None for row in self.rows)
        answers = "" if answered == len(self.rows) else f", {answered or 'none'} with an answer"
        reasons = "".join(f"; left out {count}: {reason}" for reason, count in self.left_out.items())
        names = ", ".join(self.unread[:FEW]) + (" …" if len(self.unread) > FEW else "")
        hint = " (--columns response=NAME reads one as the answer)" if self.unread and not answered else ""
        source = self.name + (f" ({self.files} file{'s' * (self.files > 1)})" if self.files else "")
        return f"{source}: {self.form}: {len(self.rows)} rows{answers}{reasons}" + (f"; columns not read: {names}{hint}" if names else "")


def read_rows(
    path: str | Path, *, columns: Mapping[str, str] | FileColumns | None = None, need_response: bool = False, safe: bool | None = False
) -> list[Row]:
    """Every row of a file, in order; see `read_source` for the arguments and errors."""
    return read_source(path, columns=columns, need_response=need_response, safe=safe).rows


def read_source(
    path: str | Path,
    *,
    columns: Mapping[str, str] | FileColumns | None = None,
    need_response: bool = False,
    safe: bool | None = False,
    keep: bool = False,
) -> Reading:
    """Read a source, and log in one line what it was recognised as, how many rows were taken, and what was left out and why.

    Args:
        path: a file or directory that `open_records` opens, a pattern of files that are one set, or a hub set; `#SPLIT` may follow.
        columns: name of a field (`sku_vllm.data.columns.FIELDS`) → name of the file's column.
        need_response: refuse rows without an answer.
        safe: where a file holds both (PKU-SafeRLHF, XSTest, preference pairs), take the safe rows, for a retain set, instead of the
            unsafe ones; None takes all.
        keep: keep the records as they stand in the file.

    Raises:
        DataError: with file and line (or row) number, and what to do.
    """
    wanted = columns if isinstance(columns, FileColumns) else FileColumns(own=columns or {})
    records = open_records(path)
    with reading_bar(records.name, records.total) as bar:
        numbered = iter(records.numbered)
        sample = list(islice(numbered, SAMPLE))
        reading = _read(records, wanted, sample, bar(chain(sample, numbered)), (need_response, safe, keep))
    if not reading.rows:
        marked = any(reason.startswith(SIDES) for reason in reading.left_out)
        kind = "rows" if not marked else "unsafe answers or prompts" if safe is False else "safe answers or prompts"
        reasons = ", ".join(f"left out {count}: {reason}" for reason, count in reading.left_out.items())
        raise DataError(f"{reading.name}: no {kind}" + (f" ({reasons}); give other rows" if reasons else ""))
    if records.split is not None:
        kept = _in_split(reading.rows, records.split, reading.name)
        reading.rows = [row for row, chosen in zip(reading.rows, kept, strict=True) if chosen]
        reading.origins = [origin for origin, chosen in zip(reading.origins, kept, strict=False) if chosen]
        reading.name = f"{reading.name}#{records.split}"
    held = _held.get()
    logger.info(reading.text()) if held is None else held.append(reading.text())
    return reading


@contextmanager
def notices_at_the_end() -> Iterator[None]:
    """What readers say is logged when the block ends; an error in it stands alone, without what was read before."""
    said: list[str] = []
    token = _held.set(said)
    try:
        yield
    finally:
        _held.reset(token)
    for line in said:
        logger.info(line)


Numbered = Iterator[tuple[int, dict[str, Any]]]


def _read(records: Records, columns: FileColumns, sample: Sequence[tuple[int, Any]], numbered: Numbered, how: tuple[Any, ...]) -> Reading:
    need_response, safe, keep = how
    names: dict[str, str] = {}
    plain: set[str] = set()
    first = [_normalised(record, names, plain) for _, record in sample]
    given = set(names.values())
    mapping = columns.within(records.name, given) if sample else {}
    first = [decoded(_mapped(record, mapping)) for record in first]
    known = known_set(given | mapping.keys(), first)
    if known and known.harmful_only and safe:
        raise DataError(f"{records.name}: {known.name} are harmful prompts, so none is for a retain set; give it to --forget")
    form, _ = (known.name, set()) if known else recognise(given | mapping.keys())
    reading = Reading(records.name, form, files=records.files)
    seen: set[tuple[str, str | None]] = set()
    for number, record in numbered:
        fields = decoded(_mapped(_normalised(record, names, plain), mapping))
        try:
            for row in known.rows(fields, str(number), safe) if known else generic_rows(fields, safe):
                if isinstance(row, LeftOut):
                    reading.left_out[str(row)] += 1
                    continue
                row = _over(row, fields, mapping) if known and mapping else row
                if need_response and (row.response is None or not row.response.strip()):
                    if not known and not LACKING.isdisjoint(fields):
                        reading.left_out["without an answer"] += 1
                        continue
                    raise BadRow(f"no 'response'; training needs an answer for every prompt; {HELP}")
                if known and known.once and safe is not None:
                    if (row.key, row.response) in seen:
                        reading.left_out["answers that were there before"] += 1
                        continue
                    seen.add((row.key, row.response))
                reading.rows.append(row)
                if keep:
                    reading.origins.append(record)
        except LeftOut as reason:
            reading.left_out[str(reason)] += 1
        except BadRow as fault:
            if all(value is None for value in fields.values()):
                reading.left_out["an empty row"] += 1  # tables end with rows of nothing but separators
                continue
            absent = f"; it has no column {columns.missing[0]!r} (--columns)" if columns.missing else ""
            absent += f"; it has {', '.join(name[:30] for name in [*names][:FEW])}" if str(fault).startswith(NO_PROMPT) else ""
            raise DataError(f"{records.place(number)}: {fault}{absent}") from fault
    if not known:
        _, unread = recognise({*names.values()} | mapping.keys())
        reading.unread = sorted(key for key, name in names.items() if name in unread and name not in mapping.values())
    return reading


def _normalised(record: dict[str, Any], names: dict[str, str], plain: set[str]) -> dict[str, Any]:
    """The record under normalised names; itself where its names are so already. An exact name wins over one that becomes it.

    names: every name seen so far → its normalised form. plain: those that are their own.
    """
    if record.keys() <= plain:
        return record
    for key in record:
        if key not in names:
            names[key] = normal(key)
            plain.update({key} if names[key] == key else ())
    return {names[key]: value for key, value in record.items()} | {key: value for key, value in record.items() if names[key] == key}


def _mapped(record: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    return {**record, **{key: record.get(column) for key, column in mapping.items()}} if mapping else record


def _over(row: Row, record: dict[str, Any], mapping: Mapping[str, str]) -> Row:
    """A row of a known format with the fields that --columns names taken from these columns instead."""
    mine = next(one for one in generic_rows({"prompt": row.prompt, **{key: record[key] for key in mapping}}, None) if isinstance(one, Row))
    fields = {"messages" if key == "prompt" else key for key in mapping}
    return replace(row, **{name: getattr(mine, name) for name in fields})


def take_split(rows: Sequence[Row], split: str, name: str) -> list[Row]:
    """The rows whose conversation falls in `split` of SPLITS.

    Raises:
        DataError: an unknown split, or one that is empty.
    """
    return [row for row, chosen in zip(rows, _in_split(rows, split, name), strict=True) if chosen]


def _in_split(rows: Sequence[Row], split: str, name: str) -> list[bool]:
    if split not in SPLITS:
        raise DataError(f"{name}#{split}: unknown split; choose from {', '.join(SPLITS)}")
    keys = sorted({row.key for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    low, high = (round(edge * len(keys)) for edge in SPLITS[split])
    chosen = set(keys[low:high])
    if not chosen:
        raise DataError(f"{name}#{split}: empty; the file has only {len(keys)} different prompts")
    return [row.key in chosen for row in rows]
