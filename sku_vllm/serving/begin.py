"""The table a server starts with: what its state remembers, or what its flags say."""

import dataclasses
import shutil
from pathlib import Path

from sku_vllm.adapter import RUN
from sku_vllm.errors import ConfigError
from sku_vllm.serving.config import ServeConfig
from sku_vllm.serving.materialise import materialise
from sku_vllm.serving.state import FIRST_LORA_ID, Served, StateFile, Table


def prepare_state(config: ServeConfig, state: StateFile) -> Table:
    """The table to start with: the state's where there is one, else the flags'. Materialises adapters, and removes those no arm uses:
    only here, since vLLM may reread a retired version's directory, and dies where it is gone.

    Raises:
        ConfigError: the state was begun with other flags and --reset-state was not given.
        AdapterError: an adapter does not fit.
    """
    with state.lock(wait=True):
        table = _begin(config, state)
        used = {Path(served.path).name for served in table.arms.values()}
        for directory in (state.path.parent / "adapters").glob("*"):
            if directory.name not in used:
                shutil.rmtree(directory, ignore_errors=True)
    return table


def _begin(config: ServeConfig, state: StateFile) -> Table:
    started_with = {"arms": dict(each.split("=", 1) for each in config.arms), "split": config.parsed_split()}
    if state.exists() and not config.reset_state:
        table = state.read()
        now = {"arms": {name: each.arm.spec for name, each in table.arms.items()}, "split": table.split}
        asked = {"arms": {name: arm.spec for name, arm in config.parsed_arms().items()}, "split": config.parsed_split()}
        if config.arms and started_with != table.started_with and asked != now:
            raise ConfigError(
                f"--state {config.state}: was begun with other arms or another split than these flags; leave them as they were "
                "(the state's weights win), or add --reset-state to start from the flags"
            )
        arms = {name: _present(served, config, state) for name, served in table.arms.items()}
        if table.swap is None and arms == table.arms:
            return table
        state.write(table.changed(arms=arms, swap=None))  # the engine starts with the base's weights again
        return state.read()
    arms = {}
    next_id = FIRST_LORA_ID
    for name, arm in config.parsed_arms().items():
        arms[name] = _present(Served(arm, "", next_id if arm.kind == "lora" else 0), config, state)
        next_id += arm.kind == "lora"
    state.write(Table(arms, config.parsed_split(), started_with, next_id))
    return state.read()


def _present(served: Served, config: ServeConfig, state: StateFile) -> Served:
    """The arm with its negation on disk: written now where it is missing, as after the state's directory was moved or emptied."""
    if not served.lora_id:
        return served
    place = state.path.parent / "adapters"
    path = place / Path(served.path).name
    if not served.path or not (path / RUN).is_file():
        path = materialise(served.arm, config.model, place, revision=config.revision, any_base=config.any_base).path
    return dataclasses.replace(served, path=str(path))
