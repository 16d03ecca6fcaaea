"""Forget and retain sets: named, validated lists of rows that have answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sku_vllm.data.readers import read_rows
from sku_vllm.data.rows import Row
from sku_vllm.errors import DataError


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


KINDS = {"forget": ForgetSet, "retain": RetainSet}


def load_dataset(
    path: str | Path | Sequence[Row], kind: Literal["forget", "retain"], *, columns: Mapping[str, str] | None = None
) -> ForgetSet | RetainSet:
    """A forget or retain set from a file (see `read_rows`) or from rows.

    Of PKU-SafeRLHF rows a forget set takes the unsafe answers, a retain set the safe ones.

    Raises:
        DataError: with file and line, and what to do.
    """
    if isinstance(path, str | Path):
        return KINDS[kind](str(path), tuple(read_rows(path, columns=columns, need_response=True, safe=kind == "retain")))
    return KINDS[kind](kind, tuple(path))
