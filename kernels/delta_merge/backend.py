"""Where rows in host memory are merged: on the CPU, or through a GPU where a measurement says that is faster."""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge import Merge, MergeStats, Term, delta_merge
from sku_vllm.kernels.delta_merge.cpu import merge_rows

# The block that is timed: as large as the writer's, with a common rank.
ROWS, COLS, RANK = 1024, 4096, 32


class Backend(NamedTuple):
    """`merge` has the arguments of `merge_rows`; `name` goes into the manifest; `pinned`: whether it wants page-locked buffers."""

    name: str
    merge: Callable[..., MergeStats]
    pinned: bool = False


CPU = Backend("cpu", merge_rows)


def on_device(device: torch.device) -> Backend:
    """Rows and factors go to `device`, are merged there by `delta_merge`, and come back, on the stream of the calling thread."""

    def merge(
        weight: Tensor, terms: Sequence[Term], *, out: Tensor | None = None, seed: int | None = None, first_element: int = 0
    ) -> MergeStats:
        out = weight if out is None else out
        there = weight.to(device, non_blocking=True)
        result = there if out is weight else torch.empty_like(there, dtype=out.dtype)
        moved = [t._replace(b=t.b.to(device), a=None if t.a is None else t.a.to(device)) for t in terms]
        stats = delta_merge([Merge(there, moved, result, first_element=first_element)], seed=seed)[0]
        out.copy_(result)
        return stats

    return Backend(f"triton-{device.type}", merge, pinned=device.type == "cuda")


def choose_backend(device: str = "auto") -> Backend:
    """The backend of `--device`: "cpu", "cuda", or "auto", which times one block through the GPU against the CPU's cores.

    Raises ValueError for another name, or for "cuda" without a usable GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: unknown; choose from auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no usable GPU here; leave the flag out")
    if device == "cpu" or not torch.cuda.is_available():
        return CPU
    gpu = on_device(torch.device("cuda"))
    return gpu if device == "cuda" or _seconds(gpu) < _seconds(CPU) / len(os.sched_getaffinity(0)) else CPU


def _seconds(backend: Backend) -> float:
    """Of one block: the faster of two runs, after one that compiles. The GPU is taken to do one block at a time, a CPU one per core."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(ROWS, COLS, dtype=torch.bfloat16, pin_memory=backend.pinned).normal_(0, 0.02, generator=generator)
    term = Term(torch.randn(ROWS, RANK, generator=generator) * 1e-3, torch.randn(RANK, COLS, generator=generator) * 1e-2, 1.0)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        backend.merge(weight, [term])
        times.append(time.perf_counter() - started)
    return min(times[1:])
