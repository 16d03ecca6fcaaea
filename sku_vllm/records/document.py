"""Finds and checks the records that commands write: every `sku_<command>.json` below given directories, oldest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sku_vllm.errors import DataError
from sku_vllm.json_object import read_json_object
from sku_vllm.records.schema import REMEDY, check_record


@dataclass(frozen=True, slots=True)
class Document:
    """One record: the command that wrote it, the directory it lies in, its name in the report, and its content."""

    command: str
    directory: Path
    name: str
    data: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The options its command ran with, by name."""
        return self.data.get("config") or {}


def collect(directories: Sequence[str | Path]) -> list[Document]:
    """Read the records below `directories`, sorted by time of writing; an entry may also be a record file.

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
    """Where records of different directories have the same name, rename them to the shortest end of their path that is unique."""
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
        # A manifest and the files in an adapter's directory are no records, and an unfinished run has no result.
        unfinished = any(part.endswith(".partial") for part in file.parts)
        if file.name not in ("sku_manifest.json", "sku_run.json", "sku_tuned.json") and not unfinished:
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
    """Read a file that holds one JSON object.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    return read_json_object(file, DataError, REMEDY)
