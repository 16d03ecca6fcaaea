"""Choose where rows in host memory are merged: on the CPU, or copied to a GPU and back if that is measured to be faster.

Open this file to change what `sku fuse --device` chooses.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sku_vllm.kernels.delta_merge import Merge, MergeStats, Summand, delta_merge
from sku_vllm.kernels.delta_merge.cpu import merge_rows

# The block that is timed: 8 MiB in bf16, like a chunk of the shard writer, with a common rank.
ROWS, COLS, RANK = 1024, 4096, 32


class MergeBackend(NamedTuple):
    """`merge` has the arguments of `merge_rows`; `name` goes into the manifest; `pinned`: whether it wants page-locked buffers."""

    name: str
    merge: Callable[..., MergeStats]
    pinned: bool = False


CPU = MergeBackend("cpu", merge_rows)


def on_device(device: torch.device) -> MergeBackend:
    """A backend that copies rows and factors to `device`, merges them there and copies the result back, on the calling thread's stream."""

    def merge(
        weight: Tensor, terms: Sequence[Summand], *, out: Tensor | None = None, seed: int | None = None, first_element: int = 0
    ) -> MergeStats:
        out = weight if out is None else out
        remote = weight.to(device, non_blocking=True)
        result = remote if out is weight else torch.empty_like(remote, dtype=out.dtype)
        moved = [t._replace(b=t.b.to(device), a=None if t.a is None else t.a.to(device)) for t in terms]
        stats = delta_merge([Merge(remote, moved, result, first_element=first_element)], seed=seed)[0]
        out.copy_(result)
        return stats

    return MergeBackend(f"triton-{device.type}", merge, pinned=device.type == "cuda")


def choose_backend(device: str = "auto") -> MergeBackend:
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
    # A GPU merges one block at a time, a CPU one per core.
    return gpu if device == "cuda" or _seconds(gpu) < _seconds(CPU) / len(os.sched_getaffinity(0)) else CPU


def _seconds(backend: MergeBackend) -> float:
    """Seconds that one block takes: the faster of two runs, after one that compiles."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(ROWS, COLS, dtype=torch.bfloat16, pin_memory=backend.pinned).normal_(0, 0.02, generator=generator)
    term = Summand(torch.randn(ROWS, RANK, generator=generator) * 1e-3, torch.randn(RANK, COLS, generator=generator) * 1e-2, 1.0)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        backend.merge(weight, [term])
        times.append(time.perf_counter() - started)
    return min(times[1:])
