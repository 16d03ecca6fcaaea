"""rows.jsonl, every labelled answer of a command, and whether it is the one that the record beside it was written with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sku_vllm.output import write_text

ROWS = "rows.jsonl"
DIGEST = "rows_sha256"  # key of the record


def write_rows(directory: str | Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Write rows.jsonl (mode 0600, since it holds judged text); returns what its record says of it."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(Path(directory) / ROWS, lines, mode=0o600)
    return {DIGEST: hashlib.sha256(lines.encode()).hexdigest()}


def set_of(row: Mapping[str, Any]) -> Any:
    """The set that a row of rows.jsonl counts in: its own name, behind that of the attack where it answers under one."""
    name, attack = row.get("set", "rows"), row.get("attack")
    return f"{attack}: {name}" if isinstance(attack, str) else name


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
