"""Read and write the checkpoint of an unfinished run, `OUTPUT.partial/checkpoint/`: safetensors and JSON, replaced by renames.

Open this file to see a checkpoint's files, or the names of an optimizer's tensors in it; `run_state.py` has what is saved.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sku_vllm.errors import RunError
from sku_vllm.output import sync_tree, write_json
from sku_vllm.train.sharding import sharded_like, whole

FOLDER = "checkpoint"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that a resumed run needs.

    Attributes:
        tensors: adapters, optimizer moments, random state, by name.
        progress: step, counts, sampled rows, and the folded share of each round, for JSON.
    """

    tensors: Mapping[str, torch.Tensor]
    progress: Mapping[str, Any]

    def write(self, partial: Path) -> None:
        """Replace the checkpoint: the new one is complete and synced before the old one goes."""
        fresh, current, old = partial / f"{FOLDER}.new", partial / FOLDER, partial / f"{FOLDER}.old"
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, fresh / "state.safetensors")
        write_json(fresh / "progress.json", dict(self.progress))
        sync_tree(fresh)
        if current.exists():
            os.rename(current, old)
        os.rename(fresh, current)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def read(cls, partial: Path) -> "TrainingState | None":
        """The newest complete checkpoint, or None; a kill between the two renames leaves `.old` or `.new` whole."""
        for name in (FOLDER, f"{FOLDER}.new", f"{FOLDER}.old"):
            folder = partial / name
            if (folder / "progress.json").is_file():
                return cls._read(folder)
        return None

    @classmethod
    def _read(cls, folder: Path) -> "TrainingState":
        try:
            progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            with safe_open(folder / "state.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, ValueError) as error:
            raise RunError(f"{folder}: the checkpoint cannot be read ({error}); start again without --resume") from error
        return cls(tensors, progress)


States = Mapping[torch.Tensor, dict[str, torch.Tensor]]
"""An optimizer's state for each parameter, as in `Optimizer.state`: key ("exp_avg") → tensor."""
Names = Mapping[torch.nn.Parameter, str]
"""Parameters and their names in the model."""


def optimizer_tensors(states: States, names: Names, prefix: str = "optimizer/") -> dict[str, torch.Tensor]:
    """An optimizer's state on the CPU, each tensor named PREFIX + state key + "/" + parameter name.

    Gathers shards, so every process has to call it.
    """
    called: Mapping[torch.Tensor, str] = dict(names.items())
    return {
        f"{prefix}{key}/{called[parameter]}": whole(value.detach()).cpu()
        for parameter, state in states.items()
        for key, value in state.items()
    }


def restore_optimizer(states: States, tensors: Mapping[str, torch.Tensor], names: Names, prefix: str = "optimizer/") -> None:
    """Put `tensors`, named as `optimizer_tensors` names them, into the optimizer's `states`; other tensors are left alone."""
    parameters = {name: parameter for parameter, name in names.items()}
    for stored, value in tensors.items():
        key, _, name = stored.removeprefix(prefix).partition("/")
        if stored.startswith(prefix) and (parameter := parameters.get(name)) is not None:
            # State of another shape than the parameter (a step count, Adafactor's rows of moments) is not sharded.
            alike = value.shape == parameter.shape
            states[parameter][key] = sharded_like(value, parameter) if alike else value.to(parameter.device)
