"""Records of tables: CSV with commas, semicolons or tabs, and Parquet."""

import csv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import IO, Any

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
        reader = csv.DictReader(chain([header], file), delimiter="\t" if tabs else told or separator(header), skipinitialspace=not tabs)
        try:
            for record in reader:
                number = reader.line_num + before
                if None in record:  # DictReader's key for fields beyond the header
                    raise DataError(f"{path} line {number}: has more fields than the header; put quotes around a text that has commas")
                yield number, {key: value or None for key, value in record.items()}
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num + before}: not CSV ({error})") from error


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
