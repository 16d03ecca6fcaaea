"""`--resume` of eval, tune and attack: an interrupted run leaves OUTPUT.partial/ with its inputs, answers and verdicts.

Open this file to change which inputs must be equal to resume, and which files are removed at the end.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sku_vllm.compute_dtype import HALF
from sku_vllm.errors import ConfigError, InputError
from sku_vllm.evaluate.measure_request import MeasureRequest
from sku_vllm.model import settle_dtype
from sku_vllm.output import check_output, clear, output_directory, partial_path, remove, write_json

INPUTS = "inputs.json"
MEASUREMENTS = "measurements"
Request = TypeVar("Request", bound=MeasureRequest)


def with_dtype(request: Request) -> Request:
    """The request with what `--dtype` comes to (`ModelSpec.computed_in`): what it came to in the run that this one continues, else here.

    vLLM keeps a stored 16-bit dtype; what it makes of another is its own choice, and not said here.
    """
    spec = request.model
    inputs = partial_path(request.output) / INPUTS if request.resume and request.output is not None else None
    if spec.dtype == "auto" and inputs is not None and inputs.is_file():
        found = json.loads(inputs.read_text(encoding="utf-8")).get("computed_in")
    else:
        found = settle_dtype(spec, device="cuda" if request.backend == "vllm" else None).computed_in
        if request.backend == "vllm" and spec.dtype == "auto" and found not in HALF:
            found = None
    return replace(request, model=replace(spec, computed_in=found))


def measurement_directory(directory: Path | None, *measured: object) -> Path | None:
    """The directory for the stored answers and verdicts of one of several measurements; None if `directory` is None.

    measured: JSON values that identify the measurement.
    """
    if directory is None:
        return None
    kept = directory / MEASUREMENTS / hashlib.sha256(json.dumps(measured).encode()).hexdigest()[:16]
    kept.mkdir(parents=True, exist_ok=True)
    return kept


@contextmanager
def working_directory(
    request: Mapping[str, Any], rows: str, *, resume: bool, leftovers: tuple[str, ...] = (MEASUREMENTS,), mode: int = 0o755
) -> Iterator[Path | None]:
    """The output of a command, kept as `OUTPUT.partial/` when the run fails, for `--resume`; None for a request without an output.

    Args:
        request: as JSON. `--resume` needs the same one again, but for `judge`, which may change between runs (the endpoint moved): kept
            verdicts carry their judge's name, kept answers need none.
        rows: the digest of every row that shapes the result.
        leftovers: what is removed on success. mode: of the directory.

    Raises:
        ConfigError: the output is not empty; nothing to resume, or it was started with another request.
    """
    output = request["output"]
    if output is None:
        yield None
        return
    inputs = {key: value for key, value in request.items() if key not in ("output", "judge")} | {"rows": rows}
    check_output(output)
    if resume:
        _check(partial_path(output), inputs)
    with output_directory(output, resume=resume, keep=True, mode=mode) as directory:
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
                clear(directory)  # no answer has been stored, so there is nothing to resume
            raise


def _check(partial: Path, inputs: Mapping[str, Any]) -> None:
    if not (partial / INPUTS).is_file():
        raise ConfigError(f"--resume: there is no unfinished work in {partial}; leave --resume out to start")
    started = json.loads((partial / INPUTS).read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(inputs))
    changed = sorted(key for key in {*started, *wanted} if started.get(key) != wanted.get(key))
    if changed:
        raise ConfigError(f"--resume: {partial} was started with another {', '.join(changed)}; use the same inputs, or leave --resume out")
