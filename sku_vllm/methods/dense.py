"""Dense task vectors (`--full`): all weights train, as in the published OPT-2.7B run."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError
from sku_vllm.methods.adapted import no_dropout
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.method import Phase
from sku_vllm.methods.sharding import whole
from sku_vllm.model import load_model

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
    dtype = "float32" if config.dtype == "auto" else config.dtype
    model = load_model(path, dtype=dtype, device=accelerator.device, **no_dropout(path))
    model.requires_grad_(True)
    compares = any(term.references for phase in phases for term in phase.terms)
    return model, copy.deepcopy(model).requires_grad_(False) if compares else None


def deltas(model: PreTrainedModel, path: Path, sign: int) -> dict[str, torch.Tensor]:
    """sign·(trained − base) for every weight that changed, fp32, under the names of the checkpoint's parameters."""
    # Each base weight goes as its delta comes, so that both never lie beside the optimizer's states.
    base, found = dict(load_model(path, dtype="auto", device="cpu").named_parameters()), {}
    for name, parameter in model.named_parameters():
        delta = sign * (whole(parameter.detach()).float().cpu() - base.pop(name).detach().float())
        if delta.any():
            found[name] = delta
    return found
