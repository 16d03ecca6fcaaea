"""The dtype in which `--dtype auto` computes: what this machine computes fastest in. What is written keeps the stored dtype.

A processor may list instructions for bfloat16 and still be slower with it, or multiply matrices well in it and everything else badly, so a
small measurement decides. Open this file to change that rule.
"""

import os
import sys
import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HALF = ("bfloat16", "float16")
# A 16-bit dtype has to be this much faster in matrix products: the operations between them gain nothing from it on a CPU, and a measure
# close to 1 would fall this way one day and that way the next.
CLEARLY = 1.25
WIDTH, PREFILLED, DECODED = 1024, 128, 8  # of the measured products: rows × WIDTH by WIDTH × WIDTH
MOST_MEMORY = 0.6  # share of the machine's memory that float32 weights may take


def computed_in(dtype: str, stored: str | None, device: str, weight_bytes: int = 0) -> str:
    """What `dtype` comes to for weights stored in `stored` on a kind of device ("cpu", "cuda"); "auto" where that is not known.

    Args:
        weight_bytes: size of the stored weights; where twice as much would not fit into memory, the stored dtype stays.
    """
    if dtype != "auto":
        return dtype
    if device != "cpu" or stored not in HALF:
        return stored or "auto"
    if 2 * weight_bytes > MOST_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return stored
    return _measured(stored)


@cache
def _measured(stored: str) -> str:
    """The faster of `stored` and float32 on this CPU; says which on stderr, once a process."""
    faster = speed_over_float32(stored)
    chosen = stored if faster > CLEARLY else "float32"
    factor = f"{faster:.1f} times as fast as float32" if faster > 1 else f"{1 / faster:.1f} times as slow as float32"
    line = f"--dtype auto: computing in {chosen}; this machine multiplies matrices in the stored {stored} {factor}"
    print(line, file=sys.stderr, flush=True)
    return chosen


def speed_over_float32(dtype: str) -> float:
    """How many times as fast as float32 this CPU multiplies matrices in `dtype`: the slower of prefill and decoding, about 50 ms."""
    import torch

    kinds = getattr(torch, dtype), torch.float32
    with torch.inference_mode():
        weights = [torch.ones(WIDTH, WIDTH, dtype=kind) for kind in kinds]
        ratios = []
        for rows in (PREFILLED, DECODED):
            states = [torch.ones(rows, WIDTH, dtype=kind) for kind in kinds]
            best = [float("inf"), float("inf")]
            for attempt in range(6):  # alternately, and the best of each: what else the machine does meets both
                for which in (0, 1):
                    seconds = _seconds(states[which], weights[which])
                    if attempt:  # the first one prepares kernels
                        best[which] = min(best[which], seconds)
            ratios.append(best[1] / best[0])
    return min(ratios)


def _seconds(states: "torch.Tensor", weight: "torch.Tensor") -> float:
    from torch.nn.functional import linear

    begun = time.perf_counter()
    linear(states, weight)
    return time.perf_counter() - begun
