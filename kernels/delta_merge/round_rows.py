"""Call the compiled pass of the CPU kernel on arrays. Open this file to change what it takes or sums; the loop is `round_rows_numba.py`."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sku_vllm.kernels.delta_merge.compiled import compiled

# What is added up, in order, and the type of each in MergeStats.
SUMS: tuple[tuple[str, type], ...] = (
    ("delta_sq", float),
    ("error_sq", float),
    ("error_dot", float),
    ("max_delta", float),
    ("changed", int),
    ("nonfinite", int),
    ("overflowed", int),
)
_P = ctypes.c_void_p
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[_P] * 10)  # whose calls release the GIL


@functools.cache
def functions() -> dict[np.dtype[np.generic], Callable[..., int]]:
    """The compiled pass by the dtype of the bits that it takes: uint16 for bf16, int16 for fp16."""
    addresses = compiled(Path(__file__).with_name("round_rows_numba.py"), _llvm_ir, ("round_rows_bf16", "round_rows_fp16"))
    return {np.dtype(bits): _PROTOTYPE(address) for bits, address in zip((np.uint16, np.int16), addresses, strict=True)}


def round_rows(
    old: np.ndarray, delta: np.ndarray, new: np.ndarray, ratios: np.ndarray, where: np.ndarray, bits: np.ndarray, sums: np.ndarray
) -> int:
    """One block of the merge.

    Args:
        old, new: bits [rows, cols], which may be the same memory. delta: float32 [rows, cols].
        ratios: float32 [2]. Results below the first times max|Δ of the row| are not to be trusted, nor those that lie nearer than the
            second times it to the middle between two neighbours, where they round up or down; 0 where no edit is large.
        where, bits: int64 [rows·cols] and bits [(rows + 1)·cols]; begin with the flat indices and the old bits of those results after it.
        sums: float64 totals, in the order of SUMS, to which this block's are added.

    Returns:
        How many results are not to be trusted.
    """
    found, shape = ctypes.c_int64(), (ctypes.c_int64 * 2)(*delta.shape)
    arrays = [array.ctypes.data for array in (old, delta, new, ratios, where, bits, sums)]
    functions()[old.dtype](ctypes.addressof(found), None, *arrays, ctypes.addressof(shape))
    return found.value


def _llvm_ir() -> list[tuple[str, str]]:
    from sku_vllm.kernels.delta_merge.round_rows_numba import llvm_ir

    return llvm_ir()
