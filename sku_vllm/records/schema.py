"""The JSON Schemas of the records that commands write, and the check of a record against its schema.

Open this file to change which keys of a record are checked; the schemas, which describe every key, are in `schemas/`.
"""

import json
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, DataError

FOLDER = Path(__file__).resolve().parent / "schemas"
SHARED = "definitions.json"
REMEDY = "write it again with the command it came from"
# The keys that this package reads from each record, by record. Only these are checked, so that records of other versions can be read.
READ = {
    "eval": ("forget", "retain", "border", "lm_eval", "agreement", "row_digests", "rows_sha256", "config", "versions"),
    "tune": ("scale", "curve", "config", "versions"),
    "attack": ("before", "attacks", "config", "versions"),
    "compare": ("a", "b", "sets", "config", "versions"),
    "train": ("seconds", "config", "versions"),
    "fuse": ("config", "versions"),
    "demo": ("serving", "config", "versions"),
    "bench_agreement": ("agreement", "config", "versions"),
    "manifest": ("tensors", "adapters"),
}
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "text"),
    "number": ((int, float), "a number"),
    "integer": (int, "a whole number"),
    "boolean": (bool, "true or false"),
    "null": (type(None), "null"),
}


def schema_names() -> list[str]:
    """Names of all records, such as "eval" of `sku.eval/1`, sorted."""
    return sorted(file.name.split(".")[1] for file in FOLDER.glob("sku.*.1.json"))


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the record `sku.NAME/1`, with the shared definitions included.

    Raises:
        ConfigError: there is no such record.
    """
    file = FOLDER / f"sku.{name}.1.json"
    if not file.is_file():
        raise ConfigError(f"sku.{name}/1: no such record; choose from {', '.join(schema_names())}")
    shared = json.loads(_local(FOLDER / SHARED))["$defs"]
    return {**json.loads(_local(file)), "$defs": shared}


def _local(file: Path) -> str:
    """The text of a schema file, with references to the file of shared definitions changed to local ones."""
    return file.read_text(encoding="utf-8").replace(f'"{SHARED}#/', '"#/')


def check_record(file: Path, name: str, data: Any) -> None:
    """Check the keys of a record that this package reads (`READ`) against its schema; records not in `READ` are not checked.

    Types and required keys are checked. Keywords that restrict values (`enum`, `pattern`, `minimum`, …) are not.

    Raises:
        DataError: a key is missing or of another type; the error names the file and the key.
    """
    if name not in READ:
        return
    schema = schema_of(name)
    taken = {key: schema["properties"][key] for key in READ[name]}
    required = [key for key in schema["required"] if key in taken]
    _check(file, data, {"type": "object", "properties": taken, "required": required}, schema["$defs"], ())


def _check(file: Path, value: Any, schema: dict[str, Any], shared: dict[str, Any], at: tuple[str, ...]) -> None:
    if "$ref" in schema:
        return _check(file, value, shared[schema["$ref"].rpartition("/")[2]], shared, at)
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        raise DataError(f"{file}: {'.'.join(at)} is {type(value).__name__}, expected {TYPES[kinds[0]][1]}; {REMEDY}")
    if isinstance(value, dict):
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if missing := next((key for key in required if key not in value), None):
            raise DataError(f"{file}: has no {'.'.join((*at, missing))}; {REMEDY}")
        for key, one in value.items():
            inner = properties.get(key, schema.get("additionalProperties"))
            if inner and not (one is None and key in properties and key not in required):
                _check(file, one, inner, shared, (*at, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            _check(file, one, schema.get("items", {}), shared, (*at, str(number)))


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value has a JSON Schema type. As there, `true` is not a number and 1.0 is an integer."""
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    return isinstance(value, TYPES[kind][0]) or (kind == "integer" and isinstance(value, float) and value.is_integer())
