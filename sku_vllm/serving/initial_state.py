"""The routing table a server starts with: the one saved in its --state directory, or else the one its flags describe.

Open this file to see what a restart with --state keeps, and when the restart is refused.
"""

import dataclasses
import shutil
from pathlib import Path

from sku_vllm.adapter.adapter import RUN, LoraAdapter, load_adapter
from sku_vllm.errors import ConfigError
from sku_vllm.serving.arm_adapter import adapter_rank, load_arm, write_arm_adapter
from sku_vllm.serving.arms import Arm
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.state import FIRST_LORA_ID, Served, StateFile, Table


def prepare_state(config: ServeConfig, state: StateFile) -> Table:
    """The table to start with: the saved one where there is one, else the one from the flags.

    Missing adapters are written and unused ones deleted. They are deleted at a start only: while a server runs, vLLM may still read
    the directory of a replaced version, and exits when it is missing.

    Raises:
        ConfigError: the state was saved by a server with other flags, and --reset-state was not given.
        AdapterError: an adapter does not fit.
    """
    with state.lock(wait=True):
        table = _initial_table(config, state)
        used = {Path(served.path).name for served in table.arms.values()}
        for directory in (state.path.parent / "adapters").glob("*"):
            if directory.name not in used:
                shutil.rmtree(directory, ignore_errors=True)
    return table


def _initial_table(config: ServeConfig, state: StateFile) -> Table:
    started_with = {"arms": dict(each.split("=", 1) for each in config.arms), "split": config.parsed_split()}
    if state.exists() and not config.reset_state:
        table = state.read()
        now = {"arms": {name: each.arm.spec for name, each in table.arms.items()}, "split": table.split}
        asked = {"arms": {name: arm.spec for name, arm in config.parsed_arms().items()}, "split": config.parsed_split()}
        if config.arms and not config.follow and started_with != table.started_with and asked != now:
            raise ConfigError(
                f"--state {config.state}: was begun with other arms or another split than these flags; leave them as they were "
                "(the state's weights win), or add --reset-state to start from the flags"
            )
        arms = {name: _with_adapter(served, config, state) for name, served in table.arms.items()}
        if table.swap is None and arms == table.arms:
            return table
        state.write(table.changed(arms=arms, swap=None, swapped=""))  # a new engine holds the base's weights, so no swap is in force
        return state.read()
    arms = {}
    for number, (name, arm) in enumerate(config.parsed_arms().items(), FIRST_LORA_ID):
        served = _with_adapter(Served(arm, "", number if arm.kind == "lora" else 0), config, state)
        arms[name] = Served.numbered(arm, served.path, number, plain=bool(config.follow))
    state.write(Table(arms, config.parsed_split(), started_with, FIRST_LORA_ID + len(arms)))
    return state.read()


def _with_adapter(served: Served, config: ServeConfig, state: StateFile) -> Served:
    """The arm with its adapter on disk: written now where it is missing, as after the state's directory was moved or emptied."""
    if not served.lora_id:
        return served
    place = state.path.parent / "adapters"
    path = place / Path(served.path).name
    if not served.path or not (path / RUN).is_file():
        path = write_arm_adapter(served.arm, config.model, place, revision=config.revision, any_base=config.any_base).path
    return dataclasses.replace(served, path=str(path))


def ranks_of_arms(config: ServeConfig) -> dict[Arm, int]:
    """The rank of each adapter that a server starts with: those of the saved table, else of the configuration. Writes nothing.

    Raises:
        AdapterError: one cannot be read.
    """
    state = StateFile(config.state or config.run or "")
    saved = state.exists() and not config.reset_state
    arms = list(state.read().arms.values()) if saved else [Served(arm) for arm in config.parsed_arms().values()]
    return {served.arm: adapter_rank(_adapter_of(served, state)) for served in arms if served.arm.kind == "lora"}


def _adapter_of(served: Served, state: StateFile) -> LoraAdapter:
    """An arm's negated adapter below the state's directory, else the raw one."""
    copy = state.path.parent / "adapters" / Path(served.path).name
    return load_adapter(copy, as_is=True) if served.path and (copy / RUN).is_file() else load_arm(served.arm)
