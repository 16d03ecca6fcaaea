"""Merge FP8 (float8_e4m3fn) weights: dequantise, subtract, requantise, with the scales kept or recomputed by a pass before.

Open this file to see how blocks and rows share scales, and what is counted as clipped.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.reference import BLOCK, MergeStats, Summand, add_errors, sum_terms
from sku_vllm.kernels.delta_merge.stochastic import stochastic_round

FP8_MAX = 448.0
# Numbers up to 464 are nearest to 448, the largest FP8 number, and round to it; larger ones are counted as clipped.
CLIPPED = 464.0


class RowScales(NamedTuple):
    """Scales of some rows of an FP8 weight: `old` and `new` float32 [rows, scale columns], each element spanning `wide` columns."""

    old: Tensor
    new: Tensor
    wide: int

    def over(self, which: Tensor, start: int, stop: int, cols: int) -> Tensor:
        """Expand `which`, `old` or `new`, to one scale for each element of rows [start, stop): [stop - start, cols]."""
        return which[start:stop].repeat_interleave(self.wide, 1)[:, :cols]


def merge_blocks(shape: Sequence[int], scale: Tensor) -> tuple[int, int]:
    """Rows and columns of an FP8 weight of `shape` that share one element of `scale`: 128 for DeepSeek's blocks, else equal parts."""

    def block(size: int, count: int) -> int:
        return min(128, size) if count > 1 and -(-size // 128) == count else -(-size // count)

    (rows, cols), (tall, wide) = shape, scale.shape
    return block(rows, tall), block(cols, wide)


def rows_of(scale: Tensor, new_scale: Tensor | None, shape: Sequence[int], begin: int, end: int) -> RowScales:
    """The scales of rows [begin, end) of an FP8 weight of `shape`, one row of scales per row; without `new_scale` the old ones are kept."""
    tall, wide = merge_blocks(shape, scale)
    index = torch.arange(begin, end, device=scale.device) // tall
    old = scale[index].float()
    return RowScales(old, old if new_scale is None else new_scale[index].float(), wide)


def delta_merge_fp8_reference(
    weight: Tensor,
    terms: Sequence[Summand],
    scales: RowScales,
    *,
    out: Tensor | None = None,
    seed: int | None = None,
    first_element: int = 0,
) -> MergeStats:
    """Dequantise with `scales.old`, merge, requantise with `scales.new`; what those cannot hold is clipped and counted.

    Args:
        weight: [rows, cols], float8_e4m3fn.
        seed, first_element: as in `delta_merge_reference`; with a seed all is computed in float64, else in float32.
    Raises:
        ValueError: a weight that is not FP8, or scales of other rows.
    """
    out = weight if out is None else out
    if weight.dtype != torch.float8_e4m3fn or out.dtype != weight.dtype or scales.old.shape[0] != weight.shape[0]:
        raise ValueError(
            f"an FP8 merge needs a float8_e4m3fn weight with scales for each of its rows, not {weight.dtype} and {list(scales.old.shape)}"
        )
    stats, compute = MergeStats(elements=weight.numel()), torch.float32 if seed is None else torch.float64
    cols = weight.shape[1]
    for start, stop, old, delta in _dequantised(weight, terms, scales, compute):
        target, factor = old - delta, scales.over(scales.new, start, stop, cols).to(compute)
        scaled = target / factor
        within = scaled.clamp(-FP8_MAX, FP8_MAX)
        new = within.to(weight.dtype) if seed is None else stochastic_round(within, weight.dtype, seed, first_element + start * cols)
        kept = new.to(compute) * factor
        stats.clipped += int((scaled.abs() > CLIPPED).sum())
        out[start:stop] = new
        low, high = delta.aminmax()
        stats.max_delta = max(stats.max_delta, float(high), -float(low))
        stats.changed += int((kept != old).sum())
        add_errors(stats, old, kept, target, delta)
    return stats


def recomputed_scale(weight: Tensor, terms: Sequence[Summand], scale: Tensor) -> Tensor:
    """The first of two passes: scales, shaped as `scale`, by which each block's largest |W − Δ| is stored as the largest FP8 number.

    A block of zeros keeps its scale, and NaN is ignored.
    """
    rows, cols = weight.shape
    scales = rows_of(scale, None, weight.shape, 0, rows)
    tall, largest = merge_blocks(weight.shape, scale)[0], torch.zeros_like(scale, dtype=torch.float32)
    for start, stop, old, delta in _dequantised(weight, terms, scales, torch.float32):
        size = old.sub_(delta).abs_().nan_to_num_(0.0)
        by_block = torch.nn.functional.pad(size, (0, -cols % scales.wide)).view(stop - start, -1, scales.wide).amax(2)
        block = (torch.arange(start, stop, device=scale.device) // tall)[:, None].expand_as(by_block)
        largest.scatter_reduce_(0, block, by_block, "amax")
    return torch.where(largest > 0, largest / FP8_MAX, scale.float())


def _dequantised(
    weight: Tensor, terms: Sequence[Summand], scales: RowScales, compute: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first row, last row + 1, W, Δ) block by block, in `compute`."""
    rows, cols = weight.shape
    step = max(1, BLOCK // max(cols, 1))
    for start in range(0, rows if cols else 0, step):
        stop = min(start + step, rows)
        old = weight[start:stop].to(compute) * scales.over(scales.old, start, stop, cols).to(compute)
        delta = torch.empty_like(old)
        sum_terms(terms, start, delta)
        yield start, stop, old, delta
