"""The definition of the delta merge, in torch: W' = round(W − Σ coefficient·(B@A)), summed in float64 and rounded once.

Every other implementation is tested against it, and on a CPU it merges what the compiled kernel does not: fp32 and fp64 weights,
stochastic rounding, edits that are large beside the weight. It works in blocks of rows, whose temporaries fit a core's cache. Open this
file to see what a merge computes; change it only together with every other implementation.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.stochastic import FORMATS, stochastic_round

# Elements per block: two float64 temporaries of 1 MiB each stay in the second-level cache.
BLOCK = 1 << 17
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Summand(NamedTuple):
    """One summand of the edit, on rows [row, row + len(b)) of the weight.

    coefficient·(b @ a) for b [rows, rank] and a [rank, cols]; coefficient·b for a dense b [rows, cols] with a None.
    """

    b: Tensor
    a: Tensor | None
    coefficient: float
    row: int = 0


class Merge(NamedTuple):
    """One weight [rows, cols] and its edit; `out` None means in place.

    `scale` of an FP8 weight (float8_e4m3fn): float32 [scale rows, scale columns], each spanning an equal block: [1, 1] per tensor,
    [rows, 1] per channel. `new_scale`, of the same shape, belongs to the result (`recomputed_scale`); None keeps `scale`, and what
    that cannot hold is clipped and counted. `first_element`: index of weight[0, 0] in a larger weight, for stochastic rounding.
    """

    weight: Tensor
    terms: Sequence[Summand]
    out: Tensor | None = None
    scale: Tensor | None = None
    new_scale: Tensor | None = None
    first_element: int = 0


@dataclass(slots=True)
class MergeStats:
    """Statistics of one or more merges; Δ is the whole subtracted edit, e = W' − (W − Δ) the rounding error.

    Attributes:
        delta_sq: ΣΔ². error_sq: Σe². error_dot: Σ e·Δ. elements: how many. changed: of them, those whose bits changed.
        max_delta: max |Δ|. nonfinite: NaN or infinite elements of the base, left out of the sums. overflowed: finite sums that
        the weight's dtype cannot hold. clipped: FP8 elements outside the range of their kept scale.
    """

    delta_sq: float = 0.0
    error_sq: float = 0.0
    error_dot: float = 0.0
    elements: int = 0
    changed: int = 0
    max_delta: float = 0.0
    nonfinite: int = 0
    overflowed: int = 0
    clipped: int = 0

    def add(self, other: "MergeStats") -> None:
        """Add the statistics of another merge: sums are added, `max_delta` becomes the larger one."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, theirs) if field.name == "max_delta" else mine + theirs)

    @property
    def retained(self) -> float | None:
        """⟨W − W', Δ⟩ / ‖Δ‖²: 1 when rounding kept the whole edit; None for an empty edit."""
        return 1.0 - self.error_dot / self.delta_sq if self.delta_sq else None

    @property
    def noise(self) -> float | None:
        """‖(W − W') − retained·Δ‖ / ‖Δ‖; None for an empty edit."""
        if not self.delta_sq:
            return None
        return math.sqrt(max(self.error_sq - self.error_dot**2 / self.delta_sq, 0.0) / self.delta_sq)


def delta_merge_reference(
    weight: Tensor, terms: Sequence[Summand], *, out: Tensor | None = None, seed: int | None = None, first_element: int = 0
) -> MergeStats:
    """W' = round(W − Σ terms), into `out`, or in place.

    Args:
        weight: [rows, cols], bf16, fp16, fp32 or fp64. out: same shape, any of these dtypes.
        seed: None rounds to nearest, ties to even. A number rounds bf16, fp16 or fp32 stochastically: |x| is rounded up with a probability
            equal to the part of an ulp that truncation would drop, by a hash of seed and element index, so that the result does not
            depend on how the weight is cut up.
        first_element: index of weight[0, 0] in the whole weight, for that hash.
    Raises:
        ValueError: shapes, dtypes or rounding that don't fit together.
    """
    out = weight if out is None else out
    check_merge(weight, terms, out, seed)
    rows, cols = weight.shape
    stats = MergeStats(elements=weight.numel())
    if not stats.elements:
        return stats
    ready = [term._replace(a=None if term.a is None else term.a.double()) for term in terms]
    step = max(1, BLOCK // cols)
    scratch = _scratch(min(step, rows) * cols)
    for start in range(0, rows, step):
        old, new = weight[start : start + step], out[start : start + step]
        target, delta = (part[: old.numel()].view(old.shape) for part in scratch)
        sum_terms(ready, start, delta)
        torch.sub(target.copy_(old), delta, out=target)
        before = old.clone() if new.data_ptr() == old.data_ptr() else old
        new.copy_(target if seed is None else stochastic_round(target, new.dtype, seed, first_element + start * cols))
        stats.changed += _count_changed(before, new)
        low, high = delta.aminmax()
        largest = max(float(high), -float(low))
        stats.max_delta = max(stats.max_delta, largest if math.isfinite(largest) else 0.0)
        add_errors(stats, before, new, target, delta)
    return stats


class _Scratch(threading.local):
    """Two float64 vectors that each thread keeps: allocating them for every block took longer than the sums."""

    vectors = (torch.empty(0, dtype=torch.float64),) * 2


_buffers = _Scratch()


def _scratch(elements: int) -> tuple[Tensor, Tensor]:
    if _buffers.vectors[0].numel() < elements:
        size = max(elements, BLOCK)
        _buffers.vectors = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    return _buffers.vectors


def sum_terms(terms: Sequence[Summand], start: int, delta: Tensor) -> None:
    """Write Σ terms over rows [start, start + len(delta)) of the weight into `delta`, computed in its dtype."""
    stop, fresh = start + delta.shape[0], True
    for term in terms:
        low, high = max(start, term.row), min(stop, term.row + term.b.shape[0])
        if low >= high:
            continue
        covers = low == start and high == stop
        if fresh and not covers:
            delta.zero_()
        beta = 0.0 if fresh and covers else 1.0
        window, b = delta[low - start : high - start], term.b[low - term.row : high - term.row].to(delta.dtype)
        if term.a is not None:
            window.addmm_(b, term.a.to(delta.dtype), beta=beta, alpha=term.coefficient)
        elif beta:
            window.add_(b, alpha=term.coefficient)
        else:
            torch.mul(b, term.coefficient, out=window)
        fresh = False
    if fresh:
        delta.zero_()


def _count_changed(before: Tensor, new: Tensor) -> int:
    """How many bit patterns differ. In numpy: at 2^18 elements its loop took 15 µs where torch's took 120 (torch 2.13, Zen 4)."""
    if before.dtype != new.dtype:
        return int(np.count_nonzero(before.double().numpy() != new.double().numpy()))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    return int(np.count_nonzero(before.view(bits).numpy() != new.view(bits).numpy()))


def add_errors(stats: MergeStats, before: Tensor, new: Tensor, target: Tensor, delta: Tensor) -> None:
    """Add one block's sums. `target` = W − Δ before rounding; it is overwritten with the rounding error's negative."""
    error = target.sub_(new.to(target.dtype))
    flat, edit = error.reshape(-1), delta.reshape(-1)
    error_sq = float(torch.dot(flat, flat))
    if not math.isfinite(error_sq):
        bad = ~torch.isfinite(error)
        stats.nonfinite += int((~torch.isfinite(before)).sum())
        stats.overflowed += int((torch.isfinite(before) & ~torch.isfinite(new)).sum())
        flat, edit = error.masked_fill(bad, 0).reshape(-1), delta.masked_fill(bad, 0).reshape(-1)
        error_sq = float(torch.dot(flat, flat))
    stats.error_sq += error_sq
    stats.error_dot -= float(torch.dot(flat, edit))
    stats.delta_sq += float(torch.dot(edit, edit))


def check_merge(weight: Tensor, terms: Sequence[Summand], out: Tensor, seed: int | None) -> None:
    """Check the arguments of any implementation. Raises ValueError."""
    if weight.ndim != 2 or out.shape != weight.shape:
        raise ValueError(f"weight and out must be the same matrix shape, not {list(weight.shape)} and {list(out.shape)}")
    if weight.dtype not in WEIGHT_DTYPES or out.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight and out must be bf16, fp16, fp32 or fp64, not {weight.dtype} and {out.dtype}")
    if seed is not None and out.dtype not in FORMATS:
        raise ValueError(f"stochastic rounding is for bf16, fp16 and fp32 weights, not {out.dtype}; round to nearest")
    rows, cols = weight.shape
    for number, (b, a, coefficient, row) in enumerate(terms):
        shape = (b.shape[0], a.shape[1]) if a is not None and a.ndim == 2 and b.ndim == 2 and b.shape[1] == a.shape[0] else tuple(b.shape)
        if a is not None and shape == tuple(b.shape) and b.shape[-1:] != a.shape[:1]:
            raise ValueError(f"term {number}: b {list(b.shape)} and a {list(a.shape)} cannot be multiplied")
        if len(shape) != 2 or shape[1] != cols or row < 0 or row + shape[0] > rows:
            raise ValueError(f"term {number}: an edit of {list(shape)} at row {row} does not fit a weight of {[rows, cols]}")
        if not math.isfinite(coefficient):
            raise ValueError(f"term {number}: coefficient is {coefficient}")
