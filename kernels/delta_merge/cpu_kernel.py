"""The merge of 16-bit weights on a CPU: one compiled pass over each row subtracts, rounds, compares and sums.

In torch the same takes ten passes over every block. Sums are float32, with a second look in float64 where an element
comes out so small beside the edit that float32's error could exceed an ulp; weights for which that would be common are refused,
and the caller takes the reference.
"""

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.reference import MergeStats, Term, sum_terms

# Elements per block: a float32 edit of 2 MiB. Every product packs A anew, so smaller blocks lose more by that than the nearer cache wins.
BLOCK = 1 << 19
# The unsigned or signed 16 bits by which round_rows knows a dtype's format.
BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16}
# Of one or two elements, float32 sums leave nothing of `noise` but their own rounding; so few are no work for the reference either.
FEWEST = 64
# float32 sums are trusted where the edit's norm is at most this share of the weight's (fp16 has three more bits to get right) …
SMALL_EDIT = {torch.bfloat16: 1 / 16, torch.float16: 1 / 64}
# … and the result at least this, times √rank, of the row's largest edit: below that float32's error can exceed an ulp.
CANCELLED = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-13}


def load_round_rows() -> None:
    """Load the compiled pass, which compiles it on a machine's first use; else the first merge does."""
    from sku_vllm.kernels.delta_merge import round_rows  # noqa: F401


def merge_16_bit(weight: Tensor, terms: Sequence[Term], out: Tensor) -> MergeStats | None:
    """W' = round(W − Σ terms) into `out`, which may be `weight`; None, and nothing done, where this kernel is not the one for it.

    Args:
        weight, out: [rows, cols], both bf16 or both fp16, contiguous.
    """
    dtype = weight.dtype
    fits = dtype in BITS and dtype == out.dtype and weight.is_contiguous() and out.is_contiguous() and weight.numel() >= FEWEST
    if not fits or not _is_small(terms, SMALL_EDIT[dtype] * _norm(weight)):
        return None
    from sku_vllm.kernels.delta_merge.round_rows import SUMS, round_rows

    rows, cols = weight.shape
    step = max(1, min(BLOCK // cols, rows))
    scratch, ready = _scratch(step, cols), [term._replace(a=None if term.a is None else term.a.float()) for term in terms]
    ratio = np.float32(CANCELLED[dtype] * _root_rank(terms))
    old, new, totals = _bits(weight), _bits(out), np.zeros(len(SUMS))
    cancelled: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, rows, step):
        delta = scratch.delta[: min(step, rows - start) * cols].view(-1, cols)
        sum_terms(ready, start, delta)
        stop = start + delta.shape[0]
        row, bits = scratch.row.view(old.dtype), scratch.bits.view(old.dtype)
        found = round_rows(old[start:stop], delta.numpy(), new[start:stop], row, ratio, scratch.where, bits, totals)
        if found:
            cancelled.append((scratch.where[:found] + start * cols, bits[:found].copy()))
    if cancelled:
        _sum_again(out, terms, *(np.concatenate(part) for part in zip(*cancelled, strict=True)))
    return MergeStats(elements=weight.numel(), **{name: kind(value) for (name, kind), value in zip(SUMS, totals, strict=True)})


class _Scratch(threading.local):
    """Per thread: allocating these for every block cost more than the sums."""

    delta = torch.empty(0)
    row, bits, where = np.empty(0, np.int16), np.empty(0, np.int16), np.empty(0, np.int64)


_kept = _Scratch()


def _scratch(rows: int, cols: int) -> _Scratch:
    if _kept.delta.numel() < rows * cols:
        size = max(rows * cols, BLOCK)
        _kept.delta, _kept.bits, _kept.where = torch.empty(size), np.empty(size, np.int16), np.empty(size, np.int64)
    if len(_kept.row) < cols:
        _kept.row = np.empty(cols, np.int16)
    return _kept


def _bits(matrix: Tensor) -> np.ndarray:
    return matrix.detach().view(torch.int16).numpy().view(BITS[matrix.dtype])


def _is_small(terms: Sequence[Term], limit: float) -> bool:
    """Whether ‖Δ‖ ≤ limit. ‖B‖·‖A‖ ≥ ‖BA‖ mostly decides; the norm itself costs up to an eighth of a merge at rank 128.

    ‖B‖·‖A‖ is √r·‖BA‖ for factors in general position. More than twice √r·limit means that they cancel on the way to a small Δ,
    of which float32 sums keep too little.
    """
    bound = _edit_norm(terms, _product_bound)
    return bound <= limit or (bound <= 2 * _root_rank(terms) * limit and _edit_norm(terms, _product_square) <= limit)


def _root_rank(terms: Sequence[Term]) -> float:
    return math.sqrt(sum(1 if term.a is None else term.a.shape[0] for term in terms))


def _edit_norm(terms: Sequence[Term], square_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """An upper bound of ‖Δ‖: the sum of the terms' norms."""
    squares = [(b.float().square().sum() if a is None else square_of(b.float(), a.float())) for b, a, _, _ in terms]
    return sum(abs(term.coefficient) * math.sqrt(max(float(square), 0.0)) for term, square in zip(terms, squares, strict=True))


def _product_bound(b: Tensor, a: Tensor) -> Tensor:
    return b.square().sum() * a.square().sum()


def _product_square(b: Tensor, a: Tensor) -> Tensor:
    """‖BA‖² = tr(BᵀB·AAᵀ), through r×r matrices."""
    return ((b.T @ b) * (a @ a.T)).sum()


def _norm(weight: Tensor) -> float:
    """‖W‖ estimated from every 16th row; 0 when that holds NaN or infinity, which means: trust nothing."""
    every = 16 if weight.shape[0] >= 256 else 1
    norm = float(torch.linalg.vector_norm(weight[::every], dtype=torch.float32)) * math.sqrt(every)
    return norm if math.isfinite(norm) else 0.0


def _sum_again(out: Tensor, terms: Sequence[Term], flat: np.ndarray, old_bits: np.ndarray) -> None:
    """Round once more, from float64 sums, the elements where float32 could be off by more than an ulp."""
    rows, columns = (torch.from_numpy(index) for index in np.divmod(flat, out.shape[1]))
    exact = torch.from_numpy(old_bits.view(np.int16)).view(out.dtype).double()
    for b, a, coefficient, first in terms:
        inside = (rows >= first) & (rows < first + b.shape[0])
        local, where = rows[inside] - first, columns[inside]
        values = b[local, where].double() if a is None else (b[local].double() * a[:, where].T.double()).sum(1)
        exact[inside] -= coefficient * values
    out[rows, columns] = exact.to(out.dtype)
