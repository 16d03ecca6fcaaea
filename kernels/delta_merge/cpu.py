"""Merging on a CPU: the compiled kernel where it fits, else the reference, rows dealt out to threads of our own.

torch's own threads meet after every small operation, and blocks sized for a cache make for many of those.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.cpu_kernel import merge_16_bit
from sku_vllm.kernels.delta_merge.fp8 import delta_merge_fp8_reference, rows_of
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats, Term, check_merge, delta_merge_reference

# Elements per piece of work: enough to be worth a thread's while, little enough to share out one large weight.
PIECE = 1 << 22


@contextmanager
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_rows(
    weight: Tensor, terms: Sequence[Term], *, out: Tensor | None = None, seed: int | None = None, first_element: int = 0
) -> MergeStats:
    """`delta_merge_reference`, same arguments and errors, by the compiled kernel where it fits."""
    out = weight if out is None else out
    check_merge(weight, terms, out, seed)
    stats = merge_16_bit(weight, terms, out) if seed is None else None
    return stats or delta_merge_reference(weight, terms, out=out, seed=seed, first_element=first_element)


def merge_on_cpu(merges: Sequence[Merge], seed: int | None = None) -> list[MergeStats]:
    """`delta_merge` for weights in memory."""
    pieces = [(index, start, stop) for index, merge in enumerate(merges) for start, stop in _pieces(merge)]

    def run(piece: tuple[int, int, int]) -> MergeStats:
        torch.set_num_threads(1)
        return _merge_rows(merges[piece[0]], piece[1], piece[2], seed)

    totals = [MergeStats() for _ in merges]
    with one_torch_thread(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (index, _, _), stats in zip(pieces, pool.map(run, pieces), strict=True):
            totals[index].add(stats)
    return totals


def _pieces(merge: Merge) -> Iterator[tuple[int, int]]:
    rows, cols = merge.weight.shape
    step = max(1, PIECE // max(cols, 1))
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def _merge_rows(merge: Merge, start: int, stop: int, seed: int | None) -> MergeStats:
    weight, terms, out, scale, new_scale, first = merge
    if start == 0 and stop == weight.shape[0]:
        inner = list(terms)
    else:
        inner = [term for whole in terms for term in _cut(whole, start, stop)]
    part, target = weight[start:stop], None if out is None else out[start:stop]
    if scale is None:
        return merge_rows(part, inner, out=target, seed=seed, first_element=first + start * weight.shape[1])
    scales = rows_of(scale, new_scale, weight.shape, start, stop)
    return delta_merge_fp8_reference(part, inner, scales, out=target, seed=seed, first_element=first + start * weight.shape[1])


def _cut(term: Term, start: int, stop: int) -> Iterator[Term]:
    low, high = max(start, term.row), min(stop, term.row + term.b.shape[0])
    if low < high:
        yield term._replace(b=term.b[low - term.row : high - term.row], row=low - start)
