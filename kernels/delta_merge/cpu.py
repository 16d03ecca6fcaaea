"""Merge on a CPU: by the compiled kernel where it applies, else by the reference, with rows shared out among threads made here.

torch's own threads are not used: they wait for each other after every operation, and blocks that fit a cache mean many small ones.
Open this file to change how a merge is shared out among cores.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge.cpu_kernel import merge_16_bit
from sku_vllm.kernels.delta_merge.fp8 import delta_merge_fp8_reference, rows_of
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats, Summand, check_merge, delta_merge_reference

# Elements per piece of work: large beside the cost of a thread's turn, small enough to share one large weight among threads.
PIECE = 1 << 22


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes in the calling thread alone, since callers have threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_rows(
    weight: Tensor, terms: Sequence[Summand], *, out: Tensor | None = None, seed: int | None = None, first_element: int = 0
) -> MergeStats:
    """`delta_merge_reference`, with the same arguments and errors, by the compiled kernel where that applies."""
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


def _cut(term: Summand, start: int, stop: int) -> Iterator[Summand]:
    low, high = max(start, term.row), min(stop, term.row + term.b.shape[0])
    if low < high:
        yield term._replace(b=term.b[low - term.row : high - term.row], row=low - start)
