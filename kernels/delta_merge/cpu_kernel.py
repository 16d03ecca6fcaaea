"""The merge of 16-bit weights on a CPU: one compiled pass over each row subtracts, rounds, compares and sums.

torch needs ten passes over every block for it. Sums are float32; elements so small beside the edit that float32's error could
exceed an ulp are computed again in float64. Where float32 sums cannot be trusted at all, because large products cancel in a small edit,
`merge_16_bit` does nothing, and its caller uses the reference. Open this file for what is done around the compiled pass, which is in
`round_rows_numba.py`.
"""

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.reference import MergeStats, Summand, sum_terms

# Elements per block: a float32 edit of 2 MiB. Each block's matrix product packs A again, which costs smaller blocks more time than they
# save by fitting a faster cache.
BLOCK = 1 << 19
# numba has no 16-bit floats: round_rows takes their bits, and tells bf16 from fp16 by the integer type.
BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16}
# Weights with fewer elements go to the reference: for one or two, `noise` from float32 sums would be nothing but their rounding error.
FEWEST = 64
# An edit whose factors' norms make at most this share of the weight's norm needs no closer look; less for fp16, which has three more
# bits to get right.
SMALL_EDIT = {torch.bfloat16: 1 / 16, torch.float16: 1 / 64}
# Results below this · √rank · the row's largest |edit| are computed again in float64: float32's error can exceed an ulp there.
CANCELLED = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-13}


# Four times the usual error of a float32 sum over r products of random factors, as a share of √r · the row's largest |sum|.
TYPICAL_ERROR = 2.0**-26.5


def load_round_rows() -> None:
    """Load the compiled pass ahead of the first merge; on a machine's first use that compiles it."""
    from sku_vllm.kernels.delta_merge.round_rows import functions

    functions()


def merge_16_bit(weight: Tensor, terms: Sequence[Summand], out: Tensor) -> MergeStats | None:
    """W' = round(W − Σ terms) into `out`, which may be `weight`. None, with nothing done, where this kernel does not apply.

    Args:
        weight, out: [rows, cols], both bf16 or both fp16, contiguous.
    """
    dtype = weight.dtype
    fits = dtype in BITS and dtype == out.dtype and weight.is_contiguous() and out.is_contiguous() and weight.numel() >= FEWEST
    error = _error(terms, SMALL_EDIT[dtype] * _norm(weight)) if fits else None
    if error is None:
        return None
    from sku_vllm.kernels.delta_merge.round_rows import SUMS, round_rows

    rows, cols = weight.shape
    step = max(1, min(BLOCK // cols, rows))
    scratch, ready = _scratch(step, cols), [term._replace(a=None if term.a is None else term.a.float()) for term in terms]
    ratios = np.array([CANCELLED[dtype] * _root_rank(terms), error], np.float32)
    old, new, totals = _bits(weight), _bits(out), np.zeros(len(SUMS))
    cancelled: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, rows, step):
        delta = scratch.delta[: min(step, rows - start) * cols].view(-1, cols)
        sum_terms(ready, start, delta)
        stop = start + delta.shape[0]
        bits = scratch.bits.view(old.dtype)
        found = round_rows(old[start:stop], delta.numpy(), new[start:stop], ratios, scratch.where, bits, totals)
        if found:
            cancelled.append((scratch.where[:found] + start * cols, bits[:found].copy()))
    if cancelled:
        _sum_again(out, terms, *(np.concatenate(part) for part in zip(*cancelled, strict=True)))
    return MergeStats(elements=weight.numel(), **{name: kind(value) for (name, kind), value in zip(SUMS, totals, strict=True)})


class _Scratch(threading.local):
    """Buffers that each thread keeps: allocating them for every block took longer than the sums."""

    delta = torch.empty(0)
    bits, where = np.empty(0, np.int16), np.empty(0, np.int64)


_buffers = _Scratch()


def _scratch(rows: int, cols: int) -> _Scratch:
    size = max(rows * cols, BLOCK)
    if _buffers.delta.numel() < size:
        _buffers.delta, _buffers.where = torch.empty(size), np.empty(size, np.int64)
    if len(_buffers.bits) < size + cols:
        _buffers.bits = np.empty(size + cols, np.int16)
    return _buffers


def _bits(matrix: Tensor) -> np.ndarray:
    return matrix.detach().view(torch.int16).numpy().view(BITS[matrix.dtype])


def _error(terms: Sequence[Summand], small: float) -> float | None:
    """The error of float32 sums of the terms, as a share of the row's largest |Δ|; 0 where it is small beside the weight too, so that
    few results round to another number for it; None where it cannot be trusted to be that small.

    Errors are of the size of ‖B‖·‖A‖ ≥ ‖BA‖ times 2⁻²⁴. For random factors ‖B‖·‖A‖ is about √r·‖BA‖; beyond twice that, large products
    cancel. ‖BA‖ itself costs up to an eighth of a merge at rank 128, so it is taken last.

    Args:
        small: a norm of edits that is small beside the weight; 0 where the weight is not finite.
    """
    bound, root = _edit_norm(terms, _product_bound), _root_rank(terms)
    if not small or not math.isfinite(bound):
        return None
    if bound <= small:
        return 0.0
    norm = _edit_norm(terms, _product_square)
    if bound > 2 * root * max(small, norm):
        return None
    return 0.0 if norm <= small else root * TYPICAL_ERROR


def _root_rank(terms: Sequence[Summand]) -> float:
    return math.sqrt(sum(1 if term.a is None else term.a.shape[0] for term in terms))


def _edit_norm(terms: Sequence[Summand], square_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """An upper bound of ‖Δ‖: the sum of the terms' norms."""
    squares = [(b.float().square().sum() if a is None else square_of(b.float(), a.float())) for b, a, _, _ in terms]
    return sum(abs(term.coefficient) * math.sqrt(max(float(square), 0.0)) for term, square in zip(terms, squares, strict=True))


def _product_bound(b: Tensor, a: Tensor) -> Tensor:
    return b.square().sum() * a.square().sum()


def _product_square(b: Tensor, a: Tensor) -> Tensor:
    """‖BA‖² = tr(BᵀB·AAᵀ), through r×r matrices."""
    return ((b.T @ b) * (a @ a.T)).sum()


def _norm(weight: Tensor) -> float:
    """‖W‖ estimated from every 16th row; 0 if these hold NaN or infinity, so that the kernel does not apply."""
    every = 16 if weight.shape[0] >= 256 else 1
    norm = float(torch.linalg.vector_norm(weight[::every], dtype=torch.float32)) * math.sqrt(every)
    return norm if math.isfinite(norm) else 0.0


def _sum_again(out: Tensor, terms: Sequence[Summand], flat: np.ndarray, old_bits: np.ndarray) -> None:
    """Compute in float64 and round again the elements of `out` at the indices `flat`, whose bits were `old_bits`."""
    rows, columns = (torch.from_numpy(index) for index in np.divmod(flat, out.shape[1]))
    exact = torch.from_numpy(old_bits.view(np.int16)).view(out.dtype).double()
    for b, a, coefficient, first in terms:
        inside = (rows >= first) & (rows < first + b.shape[0])
        local, where = rows[inside] - first, columns[inside]
        values = b[local, where].double() if a is None else (b[local].double() * a[:, where].T.double()).sum(1)
        exact[inside] -= coefficient * values
    out[rows, columns] = exact.to(out.dtype)
