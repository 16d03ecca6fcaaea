"""Lines of JSON that outlive a run: answers and verdicts that are appended as they come, and read again for `--resume`.

Open this file to change what a run that is killed while it writes leaves behind.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def kept_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines, without one that was cut off when a run was killed; none without the file.

    Such a line is ended, so that what is appended next is a line of its own.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def keep_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Append a line for each value; the file is readable by its owner only, since it holds judged text."""
    with open(path, "a", encoding="utf-8", opener=_private) as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
