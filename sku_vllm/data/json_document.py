"""The records of a JSON document: an array of them, an object that holds them in one of the ways that programs write, or several in a row.

JSON Lines are read in `files.py`. Open this file to add another way to nest rows.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from sku_vllm.data.columns import normal
from sku_vllm.data.conversation import are_turns
from sku_vllm.data.forms import READ
from sku_vllm.errors import DataError

# As json.loads, with `null` for NaN and Infinity, which pandas writes for nothing.
DECODER = json.JSONDecoder(parse_constant=lambda _: None)
loads: Callable[[str], Any] = DECODER.decode
_NOT_SPACE = re.compile(r"\S")
SPLITS = frozenset(("train", "test", "validation", "valid", "val", "dev", "eval"))


def document_records(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, record) of a document. name: of its file, for messages.

    Raises:
        DataError: it is no JSON, or holds no rows.
    """
    values = _values(text, name)
    found: list[Any] | None = values
    if len(values) == 1:
        found = values[0] if isinstance(values[0], list) else rows_inside(values[0], name) or (values if _is_row(values[0]) else None)
    if found is None:
        raise DataError(f"{name}: a JSON object without a list of rows; expected JSON Lines, or a list of objects")
    for number, record in enumerate(found, 1):
        yield from ((number, one) for one in records_of(record, f"{name} row {number}"))


def _values(text: str, name: str) -> list[Any]:
    """The values that stand in the text one after another, as `jq` prints them; nearly always one."""
    place, values = 0, list[Any]()
    try:
        text.encode()
        while (begin := _NOT_SPACE.search(text, place)) is not None:
            value, place = DECODER.raw_decode(text, begin.start())
            values.append(value)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"{name} line {error.lineno}"
        raise DataError(f"{line}: not valid JSON ({error.msg} at column {error.colno}); correct it there") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not usable as text ({error}); write the file again") from error
    return values


def records_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The record, or records, that an element of a list is: an object, a prompt as a text, a list of turns, or a list of records.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str):
        return [{"prompt": value}]
    if are_turns(value):
        return [{"messages": value}]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return value
    raise DataError(f"{where}: {type(value).__name__} instead of a JSON object with 'prompt' and 'response'; write each row as an object")


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not READ.isdisjoint(map(normal, value))


def rows_inside(value: Any, name: str) -> list[Any] | None:
    """The rows in a JSON object, None for an object that is itself a row.

    Its one list of objects (`{"data": […]}`), lists of objects or of prompts under ids (HarmBench's completions and test cases, which get
    the id), columns as lists of one length or as objects (pandas), or rows under their ids.

    Raises:
        DataError: it holds the splits of a set, which are not one set.
    """
    if not isinstance(value, dict) or not value:
        return None
    whole = _columns(value)
    if all(isinstance(part, dict) and part for part in value.values()):
        return _objects(value)
    if _is_row(value) and whole is None:
        return None
    lists = {key: part for key, part in value.items() if isinstance(part, list) and part and all(isinstance(one, dict) for one in part)}
    if len(lists) == len(value) > 1:
        if SPLITS.issuperset(map(normal, value)):
            raise DataError(
                f"{name}: holds the splits {', '.join(value)}, which are not one set; write the one you mean to a file of its own"
            )
        return [{"id": key, **record} for key, part in lists.items() for record in part]
    if len(lists) == 1:
        ((_, rows),) = lists.items()
        return rows
    texts = all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in value.values())
    if texts and not _is_row(value) and (whole is None or len(value) > len(whole)):
        return [{"id": key, "prompt": prompt} for key, part in value.items() for prompt in part]
    return whole


def _columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object that holds columns: lists of texts, all of one length. None where it does not."""
    texts = all(isinstance(part, list) and part and isinstance(part[0], str | int | float) for part in value.values())
    if len(value) < 2 or not texts or len({len(part) for part in value.values()}) != 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _objects(value: dict[str, dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The rows of an object of objects: pandas' columns (`{"prompt": {"0": …}}`), or rows under their ids."""
    parts = list(value.values())
    if _is_row(value) and all(key.isdigit() for part in parts for key in part):
        return [{name: part[key] for name, part in value.items() if key in part} for key in parts[0]]
    return [{"id": key, **part} for key, part in value.items()] if all(map(_is_row, parts)) and not _is_row(value) else None
