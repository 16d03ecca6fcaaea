"""Continue an unfinished run. Open this file to see which settings and data a resumed run has to be given again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.json_object import read_json_object
from sku_vllm.output import partial_path, write_json
from sku_vllm.train import run_state
from sku_vllm.train.checkpointing import TrainingState
from sku_vllm.train.run import Run
from sku_vllm.train.train_request import TrainRequest

BEGUN = "train_config.json"  # in OUTPUT.partial/: settings, base and rows that a resumed run has to be given again


def as_begun(request: TrainRequest) -> TrainRequest:
    """The request, with what an unfinished run settled, if it resumes one and leaves it open: the source of refusals, and the dtype that
    `auto` came to, so that a run that was begun on another machine goes on with its arithmetic."""
    begun = (_begun(partial_path(request.directory)) or {}) if request.resume else {}
    config = request.config
    if config.targets == "auto" and begun.get("targets"):
        config = config.with_targets(begun["targets"])
    if config.dtype == "auto" and begun.get("computed_in"):
        config = replace(config, computed_in=begun["computed_in"])
    return replace(request, config=config)


def continue_run(run: Run, base: str, partial: Path, resume: bool) -> int | None:
    """Load the checkpoint in `partial` into the run if there is one to resume; returns its step.

    Args:
        base: identity of the base.

    Raises:
        ConfigError: it was begun with other settings, another base or other rows.
    """
    mine = json.loads(json.dumps({**run.config.to_json(), "base_identity": base, "rows": run.batches.digest}))
    theirs = _begun(partial) if resume else None
    if theirs is None:
        if run.accelerator.is_main_process:
            write_json(partial / BEGUN, mine)
        return None
    changed = sorted((key for key in mine if mine[key] != theirs.get(key)), key=lambda key: (key == "computed_in", key))
    if changed:
        key = "method" if "method" in changed else changed[0]  # the most useful one to name: other settings follow from it
        raise ConfigError(
            f"--resume: the unfinished run in {partial} has {key} = {theirs.get(key)!r}, not {mine[key]!r}; give the same settings, "
            "or leave out --resume to start over"
        )
    state = TrainingState.read(partial)
    if state is None:
        return None
    run_state.restore(run, state)
    return run.at


def _begun(partial: Path) -> dict[str, Any] | None:
    """Settings, base and rows of the unfinished run in `partial`; None if there is none. Raises ConfigError if they are damaged."""
    path = partial / BEGUN
    return read_json_object(path, ConfigError, "leave out --resume to start over", flag="--resume") if path.is_file() else None
