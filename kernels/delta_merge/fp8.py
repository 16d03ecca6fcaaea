"""Edits of FP8 (float8_e4m3fn) weights: dequantise, merge, requantise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.reference import BLOCK, MergeStats, Term, add_errors, sum_terms

FP8_MAX = 448.0


def merge_blocks(shape: Sequence[int], scale: Tensor) -> tuple[int, int]:
    """Rows and columns of an FP8 weight of `shape` that share one element of `scale`: 128 for DeepSeek's, else an equal cut."""
    return tuple(
        min(128, size) if count > 1 and -(-size // 128) == count else -(-size // count)
        for size, count in zip(shape, scale.shape, strict=True)
    )


def delta_merge_fp8_reference(weight: Tensor, terms: Sequence[Term], scale: Tensor, wide: int, *, out: Tensor | None = None) -> MergeStats:
    """Dequantise, merge in float32, requantise with the same scales, what they cannot hold being clipped and counted.

    Args:
        weight: [rows, cols], float8_e4m3fn. scale: [rows, scale columns], float32, each spanning `wide` columns.
    """
    out = weight if out is None else out
    if weight.dtype != torch.float8_e4m3fn or out.dtype != weight.dtype or scale.shape[0] != weight.shape[0]:
        raise ValueError(
            f"an FP8 merge needs a float8_e4m3fn weight with scales for each of its rows, not {weight.dtype} and {list(scale.shape)}"
        )
    rows, cols = weight.shape
    stats = MergeStats(elements=weight.numel())
    step = max(1, BLOCK // max(cols, 1))
    for start in range(0, rows if cols else 0, step):
        stop = min(start + step, rows)
        factor = scale[start:stop].float().repeat_interleave(wide, 1)[:, :cols]
        old = weight[start:stop].float() * factor
        delta = torch.empty_like(old)
        sum_terms(terms, start, delta)
        target = old - delta
        scaled = target / factor
        new = scaled.clamp(-FP8_MAX, FP8_MAX).to(weight.dtype)
        kept = new.float() * factor
        stats.clipped += int((scaled.abs() > FP8_MAX).sum())
        out[start:stop] = new
        low, high = delta.aminmax()
        stats.max_delta = max(stats.max_delta, float(high), -float(low))
        stats.changed += int((kept != old).sum())
        add_errors(stats, old, kept, target, delta)
    return stats
