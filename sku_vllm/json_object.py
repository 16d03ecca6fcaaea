"""Reads a file that holds one JSON object: records, configurations of adapters, settings of unfinished runs.

Open this file to change how such an error reads; rows of data, which are objects by the line, are read by `sku_vllm.data.files`.
"""

import json
from pathlib import Path
from typing import Any

from sku_vllm.errors import InputError


def read_json_object(file: Path, error: type[InputError], remedy: str, *, flag: str = "") -> dict[str, Any]:
    """The object in a file.

    Args:
        error: what to raise. remedy: what to do, for the end of its message. flag: the option that the file is read for, for the begin.

    Raises:
        error: the file cannot be read, or holds something else.
    """
    named = f"{flag}: {file}" if flag else str(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{named}: not valid JSON ({fault}); {remedy}") from fault
    if not isinstance(value, dict):
        raise error(f"{named}: {type(value).__name__} instead of one JSON object; {remedy}")
    return value
