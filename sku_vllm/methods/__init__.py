"""Methods that identify or remove harmful knowledge: one file per method around one loss, and the one loop that trains them all."""

from typing import TYPE_CHECKING

from sku_vllm.methods import (
    contrastive,
    finetune,
    ga_mismatch,
    gradient_ascent,
    npo,
    refusal_tune,
    sku,
    sku_mirrored,
    task_vector,
)
from sku_vllm.methods.config import TrainConfig

METHODS = {
    method.name: method
    for method in (
        sku_mirrored.METHOD, sku.METHOD, contrastive.METHOD, contrastive.TWO, task_vector.METHOD, gradient_ascent.METHOD,
        ga_mismatch.METHOD, finetune.METHOD, npo.METHOD, refusal_tune.METHOD,
    )
}
DEFAULT_METHOD = TrainConfig.__dataclass_fields__["method"].default

if TYPE_CHECKING:
    from sku_vllm.methods.trainer import TrainReport, train_adapter

__all__ = ["DEFAULT_METHOD", "METHODS", "TrainConfig", "TrainReport", "train_adapter"]


def __getattr__(name: str) -> object:
    """The trainer imports transformers and PEFT, which take seconds; settings and losses do without."""
    if name in ("TrainReport", "train_adapter"):
        from sku_vllm.methods import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
