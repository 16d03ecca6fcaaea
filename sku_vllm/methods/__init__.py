"""Recipes that identify or remove harmful knowledge: one file per method around one loss. The engine that runs them is `train/`.

Open this file to see which methods are built in; write another one beside them, or in a package of your own (docs/extending.md).
"""

from typing import TYPE_CHECKING

from sku_vllm.methods import (
    contrastive,
    finetune,
    ga_mismatch,
    grad_diff,
    gradient_ascent,
    npo,
    refusal_tune,
    rmu,
    simnpo,
    sku,
    sku_mirrored,
    task_vector,
    undial,
)
from sku_vllm.methods.registry import METHODS
from sku_vllm.methods.train_config import DEFAULT_METHOD, TrainConfig

if TYPE_CHECKING:
    from sku_vllm.train.trainer import train_adapter

__all__ = ["DEFAULT_METHOD", "METHODS", "TrainConfig", "train_adapter"]

for _method in (
    sku_mirrored.METHOD,
    sku.METHOD,
    contrastive.METHOD,
    contrastive.TWO,
    task_vector.METHOD,
    gradient_ascent.METHOD,
    ga_mismatch.METHOD,
    finetune.METHOD,
    npo.METHOD,
    grad_diff.METHOD,
    simnpo.METHOD,
    undial.METHOD,
    rmu.METHOD,
    refusal_tune.METHOD,
):
    METHODS[_method.name] = _method


def __getattr__(name: str) -> object:
    """Import `train_adapter` on first use: the trainer imports transformers and PEFT, which takes seconds."""
    if name == "train_adapter":
        from sku_vllm.train.trainer import train_adapter

        return train_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
