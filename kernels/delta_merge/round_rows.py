"""The compiled pass of the CPU kernel: subtract, round to bf16, compare and sum, reading and writing every element once.

numba compiles it on a machine's first use (3 s) and keeps the result beside this file, or in the user's cache directory.
Importing this module is what triggers that, so it is imported where it is first needed.
"""

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

# What is added up, in order, and the type of each in MergeStats.
SUMS = (
    ("delta_sq", float),
    ("error_sq", float),
    ("error_dot", float),
    ("max_delta", float),
    ("changed", int),
    ("nonfinite", int),
)


@intrinsic
def bits_of(context, value):
    """A float32 as the uint32 of the same bits."""
    return types.uint32(types.float32), lambda ctx, builder, signature, args: builder.bitcast(args[0], ctx.get_value_type(types.uint32))


@intrinsic
def float_of(context, value):
    """A uint32 as the float32 of the same bits."""
    return types.float32(types.uint32), lambda ctx, builder, signature, args: builder.bitcast(args[0], ctx.get_value_type(types.float32))


@intrinsic
def added(context, total, value):
    """total + value, the one sum that may be reordered: into vector lanes. Anything more would let W − Δ be rearranged, or NaN assumed away."""
    return types.float32(types.float32, types.float32), lambda ctx, builder, signature, args: builder.fadd(*args, flags=("reassoc", "nsz"))


u32, f32 = np.uint32, np.float32  # numba widens u32 + u32 to 64 bits, which halves the vectors: hence a u32() around each step


def _round_rows(old, delta, new, row, ratio, where, bits, sums):
    """One block of the merge.

    Args:
        old, new: bf16 bits [rows, cols], which may be the same memory. delta: float32 [rows, cols]. row: bf16 scratch [cols].
        ratio: results below ratio·max|Δ of the row| are too small to trust. where, bits: their flat index and old bits, filled from 0.
        sums: float64, what SUMS names, added to.
    Returns:
        How many results were too small to trust.
    """
    rows, cols = delta.shape
    found = 0
    for i in range(rows):
        top = u32(0)
        for j in range(cols):
            top = u32(max(top, u32(bits_of(delta[i, j]) & u32(0x7FFFFFFF))))
        finite = top < u32(0x7F800000)
        largest = float_of(top) if finite else f32(0)
        limit = u32((bits_of(f32(largest * ratio)) >> u32(16)) + u32(1)) if finite else u32(0)
        row[:cols] = old[i]
        delta_sq, error_sq, error_dot = f32(0), f32(0), f32(0)
        changed, small, wild = u32(0), u32(0), u32(0)
        for j in range(cols):
            before = u32(row[j])
            target = f32(float_of(u32(before << u32(16))) - delta[i, j])
            raw = bits_of(target)
            nearest = u32(u32(raw + u32(0x7FFF) + u32((raw >> u32(16)) & u32(1))) >> u32(16))  # ties to even
            after = u32((raw >> u32(16)) | u32(0x40)) if u32(raw & u32(0x7FFFFFFF)) > u32(0x7F800000) else nearest
            new[i, j] = np.uint16(after)
            error = f32(f32(float_of(u32(after << u32(16))) - float_of(u32(before << u32(16)))) + delta[i, j])  # the bracket is exact
            delta_sq = added(delta_sq, f32(delta[i, j] * delta[i, j]))
            error_sq = added(error_sq, f32(error * error))
            error_dot = added(error_dot, f32(error * delta[i, j]))
            magnitude = u32(after & u32(0x7FFF))
            changed = u32(changed + u32(after != before))
            small = u32(small + u32(magnitude < limit))
            wild = u32(wild + u32(magnitude >= u32(0x7F80)))
        if wild:  # NaN and infinity of the base stay out of the sums; an edit that makes infinity is too large to come here
            delta_sq, error_sq, error_dot = f32(0), f32(0), f32(0)
            for j in range(cols):
                if u32(row[j] & u32(0x7FFF)) >= u32(0x7F80):
                    sums[5] += 1
                else:
                    error = f32(f32(float_of(u32(u32(new[i, j]) << u32(16))) - float_of(u32(u32(row[j]) << u32(16)))) + delta[i, j])
                    delta_sq = added(delta_sq, f32(delta[i, j] * delta[i, j]))
                    error_sq = added(error_sq, f32(error * error))
                    error_dot = added(error_dot, f32(error * delta[i, j]))
        sums[0] += delta_sq
        sums[1] += error_sq
        sums[2] += error_dot
        sums[3] = max(sums[3], largest)
        sums[4] += changed
        if small:
            for j in range(cols):
                if u32(new[i, j] & u32(0x7FFF)) < limit:
                    where[found], bits[found] = i * cols + j, row[j]
                    found += 1
    return found


def _compiled():
    halves, floats, half_row = types.uint16[:, ::1], types.float32[:, ::1], types.uint16[::1]
    signature = types.int64(halves, floats, halves, half_row, types.float32, types.int64[::1], half_row, types.float64[::1])
    try:
        return numba.njit(signature, nogil=True, cache=True)(_round_rows)
    except RuntimeError:  # neither place to keep it can be written
        return numba.njit(signature, nogil=True)(_round_rows)


round_rows = _compiled()
