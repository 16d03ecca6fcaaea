"""The table that one Triton launch works through: a row per rectangle of a weight, with pointers, sizes and strides of its operands.

Open this file to change what the Triton kernel is told of a merge; the kernel refers to the columns by the numbers given here.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.fp8 import merge_blocks
from sku_vllm.kernels.delta_merge.reference import Merge, Summand, check_merge

# Rows and columns of a tile: with 16-byte accesses registers suffice for a large one; element-wise accesses need an address each.
ALIGNED_TILE, MASKED_TILE = (64, 128), (32, 64)
# Columns: pointers (bytes), then sizes and strides (elements), then where the rectangle begins, in elements and in tiles.
OUT, WEIGHT, B, A, SCALE, ROWS, COLS, RANK, LEAD, OUT_LEAD, B_LEAD, A_LEAD, SCALE_LEAD, SCALE_M, SCALE_N, ELEMENT, FIRST_TILE, NEW_SCALE = (
    range(18)
)
FIELDS = 18
# What entries of one launch have in common: dtypes of weight, result and factors, whether the edit is dense, whether all is aligned.
Kind = tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


class Entry(NamedTuple):
    """One rectangle: some rows of the weight of merge number `merge`, and their edit: factors b and a, or a dense b (a None)."""

    merge: int
    weight: Tensor
    out: Tensor
    b: Tensor
    a: Tensor | None
    coefficient: float
    element: int
    scales: tuple[Tensor, Tensor] | None
    blocks: tuple[int, int]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the tiles it is cut into."""
        return ALIGNED_TILE if self.aligned else MASKED_TILE

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.weight.shape[0] // self.tile[0]) * -(-self.weight.shape[1] // self.tile[1])

    @property
    def aligned(self) -> bool:
        """Whether every row of every operand starts at a multiple of 16 bytes, and the number of columns is a multiple of 16."""
        tensors = [self.weight, self.out, self.b] + ([] if self.a is None else [self.a])
        return self.weight.shape[1] % 16 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in tensors)

    @property
    def kind(self) -> Kind:
        """What entries of one launch have in common."""
        return self.weight.dtype, self.out.dtype, self.b.dtype, self.a is None, self.aligned

    def row(self, first_tile: int) -> list[int]:
        """Its row of the table, FIELDS numbers; `first_tile` is the number of its first tile in the launch."""
        row = [0] * FIELDS
        row[OUT], row[WEIGHT], row[B] = self.out.data_ptr(), self.weight.data_ptr(), self.b.data_ptr()
        row[ROWS], row[COLS] = self.weight.shape
        row[LEAD], row[OUT_LEAD], row[B_LEAD] = self.weight.stride(0), self.out.stride(0), self.b.stride(0)
        if self.a is not None:
            row[A], row[A_LEAD], row[RANK] = self.a.data_ptr(), self.a.stride(0), self.a.shape[0]
        if self.scales is not None:
            row[SCALE], row[NEW_SCALE] = (scale.data_ptr() for scale in self.scales)
            row[SCALE_LEAD], row[SCALE_M], row[SCALE_N] = self.scales[0].stride(0), *self.blocks
        row[ELEMENT], row[FIRST_TILE] = self.element, first_tile
        return row


def entries_of(index: int, merge: Merge, seed: int | None) -> Iterator[Entry]:
    """The rectangles of one merge: cut where a term begins or ends. Raises ValueError for what does not fit."""
    weight, terms, out, scale, new_scale, first = merge
    out = weight if out is None else out
    fp8 = weight.dtype == torch.float8_e4m3fn
    if fp8 != (scale is not None) or (fp8 and out.dtype != weight.dtype):
        raise ValueError(f"merge {index}: FP8 weights (and only they) need scales and stay FP8; got {weight.dtype} → {out.dtype}")
    check_merge(*((weight, terms, out) if not fp8 else (_stand_in(weight), terms, _stand_in(out))), seed)
    for tensor in (weight, out):
        if tensor.dtype not in DTYPES or (tensor.numel() and tensor.stride(1) != 1):
            raise ValueError(f"merge {index}: a weight must be bf16, fp16, fp32 or float8_e4m3fn with contiguous rows, not {tensor.dtype}")
        if any(factor is not None and factor.device != tensor.device for term in terms for factor in term[:2]):
            raise ValueError(f"merge {index}: its factors must be on {tensor.device} as the weight is")
    blocks = (1, 1) if scale is None else merge_blocks(weight.shape, scale)
    edges = sorted({0, weight.shape[0]} | {edge for term in terms for edge in (term.row, term.row + term.b.shape[0])})
    for low, high in zip(edges, edges[1:], strict=False):
        here = [t._replace(b=t.b[low - t.row : high - t.row]) for t in terms if t.row <= low and high <= t.row + t.b.shape[0]]
        if not here and out is weight and new_scale is None:
            continue
        if scale is not None and low % blocks[0]:
            raise ValueError(f"merge {index}: a window starts at row {low}, inside a block of {blocks[0]} rows with one scale")
        b, a, coefficient = _one_term(here, high - low, weight.shape[1], weight.device)
        scales = None
        if scale is not None:
            old, new = (s[low // blocks[0] :].float().contiguous() for s in (scale, scale if new_scale is None else new_scale))
            scales = old, new
        yield Entry(index, weight[low:high], out[low:high], b, a, coefficient, first + low * weight.shape[1], scales, blocks)


def _stand_in(weight: Tensor) -> Tensor:
    """A bf16 tensor of the same shape that takes no memory, for `check_merge`, which refuses FP8."""
    return torch.empty(1, dtype=torch.bfloat16).expand(weight.shape)


def _one_term(terms: Sequence[Summand], rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor | None, float]:
    """Combine terms over the same rows into one, exact to 2^-48: factors concatenated along the rank, or a dense float64 sum.

    Ranks are padded with zeros to multiples of 16, so that rows of b start at multiples of 16 bytes.
    """
    if not terms:
        return torch.zeros((1, 16), device=device).expand(rows, 16), torch.zeros((16, cols), device=device), 0.0
    if any(term.a is None for term in terms):
        if len(terms) == 1:
            return _rows(terms[0].b), None, terms[0].coefficient
        products = (term.coefficient * (term.b.double() if term.a is None else term.b.double() @ term.a.double()) for term in terms)
        return functools.reduce(torch.add, products), None, 1.0
    factors = [(term.b, term.a, term.coefficient) for term in terms if term.a is not None]
    if len(factors) == 1:
        b, a, coefficient = factors[0]
    else:  # float32 cannot hold all of coefficient·b: what rounding takes off gets columns of its own
        folded = torch.cat([b.double() * coefficient for b, _, coefficient in factors], 1)
        stacked, coefficient = torch.cat([a.float() for _, a, _ in factors]), 1.0
        b, a = torch.cat([folded.float(), (folded - folded.float()).float()], 1), torch.cat([stacked, stacked])
    padding = -a.shape[0] % 16
    if padding:
        b, a = torch.nn.functional.pad(b, (0, padding)), torch.nn.functional.pad(a, (0, 0, 0, padding))
    return _rows(b), _rows(a), coefficient


def _rows(factor: Tensor) -> Tensor:
    return factor if factor.stride(-1) == 1 else factor.contiguous()
