"""base − scale·delta as plain weights: no adapter beside them that slows decoding down or hides from fine-tuning and rounding."""

from pathlib import Path
from typing import TYPE_CHECKING

from sku_vllm.model import attach_adapter, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def edited_model(
    model: str | Path, adapter: str | Path, scale: float, *, dtype: str = "auto", revision: str | None = None, any_base: bool = False,
    as_is: bool = False,
) -> "PreTrainedModel":
    """Load a model and subtract an adapter (a LoRA or a dense task vector) from its weights; raises as `attach_adapter` does."""
    loaded = load_model(str(model), dtype=dtype, revision=revision)
    edited = attach_adapter(loaded, str(adapter), scale, any_base=any_base, as_is=as_is)
    return edited.merge_and_unload() if hasattr(edited, "merge_and_unload") else edited
