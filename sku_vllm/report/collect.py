"""What the other commands left behind: every `sku_<command>.json` below the given directories, oldest first."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sku_vllm.errors import DataError
from sku_vllm.report.shape import check_record


@dataclass(frozen=True, slots=True)
class Document:
    """One record: the command that wrote it, the directory it lies in, its name in the report, and its content."""

    command: str
    directory: Path
    name: str
    data: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.data.get("config") or {}


def collect(directories: Sequence[str | Path]) -> list[Document]:
    """Read the records below `directories`; a file may be named itself.

    Raises:
        DataError: a directory is missing, holds no record, or a record is not what its command writes.
    """
    documents: dict[Path, Document] = {}
    for given in map(Path, directories):
        if not given.exists():
            raise DataError(f"{given}: no such directory; give directories that sku commands wrote")
        found = list(_records(given))
        if not found:
            raise DataError(f"{given}: holds no sku_<command>.json; give directories that sku train, tune, fuse, eval or attack wrote")
        for file in found:
            documents.setdefault(file.resolve(), _read(file, given))
    return sorted(
        _told_apart(list(documents.values())), key=lambda document: (document.directory / f"sku_{document.command}.json").stat().st_mtime
    )


def _told_apart(documents: Sequence[Document]) -> list[Document]:
    """Records of different directories that share a name are called by as much of their path as tells all directories apart."""
    places = {document.directory.resolve() for document in documents}
    named: dict[str, set[Path]] = {}
    for document in documents:
        named.setdefault(document.name, set()).add(document.directory.resolve())

    def name(place: Path) -> str:
        depth = next(n for n in range(1, len(place.parts) + 1) if sum(other.parts[-n:] == place.parts[-n:] for other in places) == 1)
        return "/".join(place.parts[-depth:])

    return [replace(one, name=name(one.directory.resolve())) if len(named[one.name]) > 1 else one for one in documents]


def _records(given: Path) -> Iterator[Path]:
    if given.is_file():
        yield given
        return
    for file in sorted(given.rglob("sku_*.json")):
        # The manifest and an adapter's run file are read beside their record; unfinished work is nobody's result.
        unfinished = any(part.endswith(".partial") for part in file.parts)
        if file.name not in ("sku_manifest.json", "sku_run.json") and not unfinished:
            yield file


def _read(file: Path, given: Path) -> Document:
    data = read_json(file)
    schema = str(data.get("schema", ""))
    if not schema.startswith("sku.") or "/" not in schema:
        raise DataError(f"{file}: its schema is {schema!r}, expected sku.<command>/1; write it with a sku command")
    command = schema[4:].split("/")[0]
    check_record(file, command, data)
    inside = file.parent.relative_to(given) if given.is_dir() else Path()
    name = str(inside) if inside.parts else file.parent.resolve().name
    return Document(command, file.parent, name, data)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is not one.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); write it again with the command it came from") from error
    if not isinstance(data, dict):
        raise DataError(f"{file}: expected one JSON object; write it again with the command it came from")
    return data
