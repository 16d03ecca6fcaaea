"""The reference over many weights on a CPU: rows dealt out to threads of our own, each of which runs torch on one.

torch's own threads meet after every small operation, and blocks sized for a cache make for many of those.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from sku_vllm.kernels.delta_merge.fp8 import delta_merge_fp8_reference, merge_blocks
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats, Term, delta_merge_reference

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
    weight, terms, out, scale = merge
    if start == 0 and stop == weight.shape[0]:
        inner = list(terms)
    else:
        inner = [term for whole in terms for term in _cut(whole, start, stop)]
    part, target = weight[start:stop], None if out is None else out[start:stop]
    if scale is None:
        return delta_merge_reference(part, inner, out=target, seed=seed, first_element=start * weight.shape[1])
    tall, wide = merge_blocks(weight.shape, scale)
    return delta_merge_fp8_reference(part, inner, scale[torch.arange(start, stop) // tall], wide, out=target)


def _cut(term: Term, start: int, stop: int) -> Iterator[Term]:
    low, high = max(start, term.row), min(stop, term.row + term.b.shape[0])
    if low < high:
        yield term._replace(b=term.b[low - term.row : high - term.row], row=low - start)
