"""Reads the adapter and scale that `sku tune` chose, for `--tuned DIR` and `lora:ADAPTER@tuned`.

Open this file to change what these two mean.
"""

from dataclasses import dataclass
from pathlib import Path

from sku_vllm.errors import ConfigError, DataError
from sku_vllm.output import json_text, write_text
from sku_vllm.records.document import read_json

RECORD = "sku_tune.json"
NOTE = "sku_tuned.json"  # file in a tuned adapter's directory that names the output of the latest `sku tune`
SCALED = "adapter"  # folder in tune's output after a per-layer search: the adapter with the chosen scale and factors multiplied in


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `sku tune` chose. adapter: the directory of the adapter to subtract. scale: the scale to subtract it at."""

    adapter: str
    scale: float


def read_tuned(directory: str | Path, flag: str = "--tuned") -> Tuned:
    """What `sku tune --output DIRECTORY` chose.

    Raises:
        ConfigError: the directory is no output of tune, no scale was within the limits, or the adapter is no longer there.
    """
    directory = Path(directory)
    if not (directory / RECORD).is_file():
        raise ConfigError(f"{flag} {directory}: holds no {RECORD}; give the --output of a finished sku tune")
    try:
        data = read_json(directory / RECORD)
        scale, config = data["scale"], data["config"]
        adapter = directory / SCALED if data.get("layers") else Path(config["adapter"])
        chosen = None if scale is None else float(scale)
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{flag} {directory}: {RECORD} is not what sku tune writes ({error}); run sku tune again") from error
    if chosen is None:
        raise ConfigError(f"{flag} {directory}: no scale stayed within the limits there; train again or loosen sku tune's limits")
    if not adapter.is_dir():
        raise ConfigError(f"{flag} {directory}: its adapter {adapter} is not there (seen from this directory); run from where tune ran")
    return Tuned(str(adapter), 1.0 if data.get("layers") else chosen)


def tuned_arm(adapter: str, flag: str) -> Tuned:
    """The adapter and scale of `ADAPTER@tuned`. ADAPTER is an output of tune, or an adapter, for which the latest tune counts.

    Raises:
        ConfigError: tune was not run on this adapter; see also `read_tuned`.
    """
    folder = Path(adapter)
    if (folder / RECORD).is_file():
        return read_tuned(folder, flag)
    if not (folder / NOTE).is_file():
        raise ConfigError(f"{flag}: sku tune has chosen no scale for {adapter}; run it with --output, or write {adapter}@SCALE")
    try:
        where = str(read_json(folder / NOTE)["tuned"])
    except (DataError, KeyError) as error:
        raise ConfigError(f"{flag}: {folder / NOTE} is not what sku tune writes ({error}); run sku tune again") from error
    choice = read_tuned(where, flag)
    return Tuned(choice.adapter if choice.adapter == str(Path(where) / SCALED) else adapter, choice.scale)


def note_tuned(adapter: str | Path, output: str | Path) -> bool:
    """Write a file to the adapter's directory that names tune's output, for `tuned_arm`. False where it cannot be written."""
    try:
        write_text(Path(adapter) / NOTE, json_text({"schema": "sku.tuned/1", "tuned": str(Path(output).resolve())}), mode=0o600)
    except OSError:
        return False
    return True
