"""Forget and retain sets: named, validated lists of rows that have answers. `load_dataset` makes one from a file or from rows.

Open this file to see what a training set must have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from sku_vllm.data.columns import FileColumns
from sku_vllm.data.readers import read_rows
from sku_vllm.data.rows import Row
from sku_vllm.errors import DataError

Names = Mapping[str, str] | FileColumns | None  # of a file's columns, by field


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows under a name, each with an answer; not empty."""

    name: str
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"{self.name}: no rows")
        for number, row in enumerate(self.rows, 1):
            if row.response is None or not row.response.strip():
                raise DataError(f"{self.name} row {number}: no 'response'; training needs an answer for every prompt")

    def __len__(self) -> int:
        return len(self.rows)


class ForgetSet(RowSet):
    """Harmful prompts with harmful answers: what a model should lose."""


class RetainSet(RowSet):
    """Benign prompts with good answers: what a model should keep."""


@overload
def load_dataset(path: str | Path | Sequence[Row], kind: Literal["forget"], *, columns: Names = None) -> ForgetSet: ...


@overload
def load_dataset(path: str | Path | Sequence[Row], kind: Literal["retain"], *, columns: Names = None) -> RetainSet: ...


def load_dataset(path: str | Path | Sequence[Row], kind: Literal["forget", "retain"], *, columns: Names = None) -> ForgetSet | RetainSet:
    """A forget or retain set from a file (see `read_rows`) or from rows.

    Of PKU-SafeRLHF rows a forget set takes the unsafe answers, a retain set the safe ones.

    Args:
        kind: which of the two. columns: name of a field → name of the file's column.

    Raises:
        DataError: with file and line, and what to do.
    """
    make = ForgetSet if kind == "forget" else RetainSet
    if isinstance(path, str | Path):
        return make(str(path), tuple(read_rows(path, columns=columns, need_response=True, safe=kind == "retain")))
    return make(kind, tuple(path))
