"""Records of tables: CSV with commas, semicolons or tabs, and Parquet."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from sku_vllm.data.columns import normal
from sku_vllm.data.written import IN_TABLES, written_value
from sku_vllm.errors import DataError

Open = Callable[[Path], AbstractContextManager[IO[str]]]
SEPARATORS = ",;\t"


def table_records(path: Path, opened: Open, tabs: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of every row of a CSV or TSV file; an empty field is None. The line is the one on which a row ends.

    opened: opens the file as text. tabs: fields are separated by tabs; else by the one of `SEPARATORS` that is frequent in the header.

    Raises:
        DataError: with the line.
    """
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the 128 KiB that csv grants a field
    with opened(path) as file:
        header = file.readline()
        told = header.strip()[4:5] if header.lower().startswith("sep=") else ""  # Excel's own way to name the separator
        # csv counts lines from the header on.
        before = 1 if told else 0
        header = file.readline() if told else header
        lines = _Lines(chain([header], file))
        form: dict[str, Any] = {"delimiter": "\t" if tabs else told or separator(header), "skipinitialspace": not tabs}
        reader = csv.DictReader(lines, **form)
        begun = before + 2
        _check_names(reader.fieldnames or (), f"{path} line {before + 1}")
        lists = [name for name in reader.fieldnames or () if normal(name) in IN_TABLES]
        try:
            for record in reader:
                number = reader.line_num + before
                if lines.hidden(form):
                    raise DataError(f"{path} line {begun}: a quote that is opened is not closed, which hides the lines after it; close it")
                begun = number + 1
                if None in record:  # DictReader's key for fields beyond the header
                    raise DataError(f"{path} line {number}: has more fields than the header; put quotes around a text that has commas")
                for name in lists:
                    record[name] = written_value(record[name] or "") or record[name]
                yield number, {key: value or None for key, value in record.items()}
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num + before}: not CSV ({error})") from error


def _check_names(names: Sequence[str], where: str) -> None:
    """Raise DataError where two columns have one name: only the last of them could be read."""
    twice = [name for name, count in Counter(name.strip() for name in names).items() if name and count > 1]
    if twice:
        raise DataError(f"{where}: two columns have the name {twice[0]!r}; rename or remove one of them")


class _Lines:
    """The lines of a table; keeps those of the record that is being read."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._record = lines, list[str]()

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self._record.append(line)
            yield line

    def hidden(self, form: dict[str, Any]) -> bool:
        """Whether the record that was just read has several lines only since a quote in it is not closed; begins the next record."""
        lines, self._record = self._record, []
        if len(lines) < 2 or not any(line.strip() for line in lines[:-1]):
            return False
        try:
            for _ in csv.reader(lines, strict=True, **form):
                pass
        except csv.Error:
            return True
        return False


def separator(header: str) -> str:
    """The separator of a header line: the most frequent of `SEPARATORS` outside quotes, the comma where none is."""
    bare = "".join(header.split('"')[::2])
    return max(SEPARATORS, key=lambda character: (bare.count(character), -SEPARATORS.index(character)))


def parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, fields) of a Parquet file, read in batches. Raises DataError for a file that is none."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'sku-vllm[data]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
