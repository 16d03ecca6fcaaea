"""The peak memory of a run, on the GPU or of this process. Open this file if a report's number looks wrong."""

import ctypes
import gc
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Of oneDNN's 1024: a step's passes differ in length, and each kernel that is kept for a length of bfloat16 holds memory. A small run of 12
# steps needed 840 MB with all of them, 750 MB with 64 and 680 MB with 16, and none took longer.
KERNELS = 64


def keep_few_kernels() -> None:
    """Bound what a run on a CPU keeps of compiled kernels, so that its memory does not grow with its length.

    To be called before the process multiplies its first matrices; a limit that the user set stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def peak_memory(device: "torch.device") -> int:
    """Bytes: most memory allocated on the GPU where `device` is one, else resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_resident()


def reset_peak(device: "torch.device") -> None:
    """Forget the peak so far, so that `peak_memory` says that of what follows; where the system cannot, the peak stays.

    In a process, what it freed but still holds is given back first (glibc's malloc_trim), or it would count as used.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int:
    """Bytes resident at the peak of this process.

    Read from /proc where there is one: `ru_maxrss` outlives exec, so the memory of the process that started this one would count.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
