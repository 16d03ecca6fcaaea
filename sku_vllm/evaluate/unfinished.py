"""Work that outlives an interruption: `OUTPUT.partial/` with the inputs it was started with."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, InputError
from sku_vllm.output import check_output, clear, output_directory, partial_path, write_json

INPUTS = "inputs.json"


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
                (directory / name).unlink(missing_ok=True)
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
