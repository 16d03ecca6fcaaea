"""What describes a published format: its name, how it is recognised, and how its records become rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sku_vllm.data.answer_texts import Record
from sku_vllm.data.rows import LeftOut, Row


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A published format.

    Attributes:
        name: what the reader says it recognised.
        rows: (record, its number as text, wanted) → rows, and reasons for what is left out. `wanted` is False for harmful ones, True for
            safe ones, None for all.
        fits: (columns, the first records) → whether a file has this form. Columns are in lower case with `_` for spaces.
        once: the same prompt and answer are taken once.
        harmful_only: every prompt is harmful, so that none is for a retain set.
    """

    name: str
    rows: Callable[[Record, str, bool | None], Iterator[Row | LeftOut]]
    fits: Callable[[set[str], Sequence[Record]], bool]
    once: bool = False
    harmful_only: bool = False
