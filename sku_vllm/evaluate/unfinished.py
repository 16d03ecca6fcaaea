"""Work that outlives an interruption: `OUTPUT.partial/` with the inputs it was started with."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sku_vllm.data import Row
from sku_vllm.data.rows import rows_digest
from sku_vllm.errors import ConfigError, InputError
from sku_vllm.output import check_output, clear, output_directory, partial_path, remove, write_json

INPUTS = "inputs.json"
MEASUREMENTS = "measurements"


def begun_with(options: Mapping[str, Any], *sets: Sequence[Row]) -> dict[str, Any]:
    """What a resumed command has to be given again: its options and its rows.

    A judge may change between runs (the endpoint moved): kept verdicts carry their judge's name, kept answers need none.
    """
    inputs = {key: value for key, value in options.items() if key not in ("resume", "output", "judge")}
    return inputs | {"rows": rows_digest(*sets)}


def measuring_directory(options: Mapping[str, Any], *sets: Sequence[Row]) -> AbstractContextManager[Path | None]:
    """The resumable `--output` of a command that measures several times, each in a `place`; None without `--output`."""
    if options["output"]:
        return resumable_directory(options["output"], begun_with(options, *sets), resume=options["resume"], leftovers=(MEASUREMENTS,))
    if options["resume"]:
        raise ConfigError("--resume: give the --output of the run that was interrupted")
    return nullcontext()


def place(directory: Path | None, *measured: object) -> Path | None:
    """Where the answers and verdicts of one measurement are kept, by what is measured; None where nothing is kept."""
    if directory is None:
        return None
    kept = directory / MEASUREMENTS / hashlib.sha256(json.dumps(measured).encode()).hexdigest()[:16]
    kept.mkdir(parents=True, exist_ok=True)
    return kept


@contextmanager
def resumable_directory(output: str | Path, inputs: Mapping[str, Any], *, resume: bool, leftovers: tuple[str, ...]) -> Iterator[Path]:
    """`output_directory` that keeps `OUTPUT.partial/` when the run fails, for `--resume`; `leftovers` are removed on success.

    Raises:
        ConfigError: `--resume` without anything to resume, or with other inputs than it was started with.
    """
    check_output(output)
    if resume:
        _check(partial_path(output), inputs)
    with output_directory(output, resume=resume, keep=True) as directory:
        try:
            write_json(directory / INPUTS, inputs)
            yield directory
            for name in (*leftovers, INPUTS):
                remove(directory / name)
        except InputError:
            clear(directory)
            raise
        except BaseException:
            if {path.name for path in directory.iterdir()} <= {INPUTS}:
                clear(directory)  # nothing worth resuming
            raise


def _check(partial: Path, inputs: Mapping[str, Any]) -> None:
    if not (partial / INPUTS).is_file():
        raise ConfigError(f"--resume: there is no unfinished work in {partial}; leave --resume out to start")
    started = json.loads((partial / INPUTS).read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(inputs))
    changed = sorted(key for key in {*started, *wanted} if started.get(key) != wanted.get(key))
    if changed:
        raise ConfigError(f"--resume: {partial} was started with another {', '.join(changed)}; use the same inputs, or leave --resume out")
