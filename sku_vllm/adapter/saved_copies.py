"""Whole tensors of the base that an adapter carries along: PEFT saves embeddings that are targeted, or whose vocabulary was resized.

Untouched ones are no part of the edit, but rounded to the dtype that training loaded them in. Open this file when such an adapter is
refused.
"""

from typing import TYPE_CHECKING

from sku_vllm.adapter.delta import Dense
from sku_vllm.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    import torch


def why_no_copy(name: str, copy: Dense, reader: CheckpointReader, stored: str | None) -> str | None:
    """Why a tensor is not the base's own, rounded or not; None if it is. stored: the base's tensor of that name, if there is one."""
    if stored is None:
        return f"{name}: the adapter holds a copy of it, but the checkpoint has no such tensor"
    mine, theirs = copy.mapped(), reader.mapped(stored)
    if mine.shape != theirs.shape:
        return f"{name}: the adapter brings its own, {list(mine.shape)} instead of {list(theirs.shape)} (vocabulary resized?)"
    if _is_rounded(mine, theirs):
        return None
    return f"{name}: the adapter brings a retrained copy of it, which is no LoRA edit"


def _is_rounded(mine: "torch.Tensor", theirs: "torch.Tensor") -> bool:
    """Whether `mine` is `theirs` after loading in some dtype and saving in its own."""
    import torch

    loaded = dict.fromkeys((theirs.dtype, mine.dtype, torch.bfloat16, torch.float16))
    return any(torch.equal(theirs.to(dtype).to(mine.dtype), mine) for dtype in loaded)
