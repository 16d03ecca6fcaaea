"""The model of a dense run (`--full`), in which all weights train, and the task vector that is saved at its end.

Open this file to change how `--full` loads a model or computes its deltas; the published OPT-2.7B run trained this way.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError
from sku_vllm.methods.method import Phase
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train.lora_model import no_dropout
from sku_vllm.train.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


def load(
    path: Path, config: TrainConfig, phases: Sequence[Phase], accelerator: "Accelerator"
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model to train (fp32 unless --dtype says otherwise), and a frozen copy where a loss compares with the base.

    Raises:
        ConfigError: a method that needs both sides of the base, or rounds, which only adapters have.
    """
    sides = {term.side for phase in phases for term in phase.terms}
    if len(sides) > 1 or len(phases) > 1:
        raise ConfigError(
            f"--full: method {config.method} needs an adapter (it trains on both sides of the base, or in rounds); leave --full out"
        )
    model = load_model(ModelSpec(path, dtype=config.computed_in or "float32"), device=accelerator.device, **no_dropout(path))
    model.requires_grad_(True)
    compares = any(term.references for phase in phases for term in phase.terms)
    return model, copy.deepcopy(model).requires_grad_(False) if compares else None


def deltas(model: PreTrainedModel, path: Path, sign: int) -> dict[str, torch.Tensor]:
    """sign·(trained − base) for every weight that changed, fp32, under the names of the checkpoint's parameters."""
    # Each base weight is freed when its delta is computed, so that base and deltas are not both in memory beside the optimizer's state.
    base, found = dict(load_model(path, device="cpu").named_parameters()), {}
    for name, parameter in model.named_parameters():
        delta = sign * (whole(parameter.detach()).float().cpu() - base.pop(name).detach().float())
        if delta.any():
            found[name] = delta
    return found
