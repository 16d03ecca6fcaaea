"""Whether a rows.jsonl is the one that the record beside it was written with."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"
DIGEST = "rows_sha256"  # key of the record


def changed_rows(directory: str | Path, record: Mapping[str, Any]) -> str | None:
    """A line that names the rows.jsonl in a directory where it is not the one that the record there tells of.

    None where it is, where there is none, and where the record is of an earlier version that does not say. Raises OSError.
    """
    file, told = Path(directory) / ROWS, record.get(DIGEST)
    if not isinstance(told, str) or not file.is_file():
        return None
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if found == told else f"{file} is not what its record was written with: it was edited, or is of another run"
