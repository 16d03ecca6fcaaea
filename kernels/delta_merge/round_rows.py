"""The compiled pass of the CPU kernel: subtract, round, compare and sum, reading and writing every element once.

Importing this module compiles it on a machine's first use (see `compiled.py`), so it is imported where it is first needed. numba has
no 16-bit floats: bf16 comes as uint16 and fp16 as int16.
"""

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import ffi
from numba import types
from numba.extending import intrinsic, overload

from sku_vllm.kernels.delta_merge.compiled import compiled

# llvmlite's library object has no __dict__ and answers a request for one with a function. vLLM 0.32 looks at the __dict__ of
# every module's values when an engine starts on a CPU, and fell over that one in a process that had merged before.
ffi.lib._fntab.setdefault("__dict__", {})

# What is added up, in order, and the type of each in MergeStats.
SUMS = (
    ("delta_sq", float),
    ("error_sq", float),
    ("error_dot", float),
    ("max_delta", float),
    ("changed", int),
    ("nonfinite", int),
    ("overflowed", int),
)


def _reinterpreting(result, argument, *path):
    """An intrinsic from `argument` to `result` through LLVM casts: (builder method, LLVM type) one after the other."""

    def build(context, builder, signature, args):
        value = args[0]
        for method, kind in path:
            value = getattr(builder, method)(value, kind)
        return value

    return result(argument), build


@intrinsic
def bits_of(context, value):
    """A float32 as the uint32 of the same bits."""
    return _reinterpreting(types.uint32, types.float32, ("bitcast", ir.IntType(32)))


@intrinsic
def float_of(context, value):
    """A uint32 as the float32 of the same bits."""
    return _reinterpreting(types.float32, types.uint32, ("bitcast", ir.FloatType()))


@intrinsic
def float_of_half(context, value):
    return _reinterpreting(types.float32, types.int16, ("bitcast", ir.HalfType()), ("fpext", ir.FloatType()))


@intrinsic
def half_of_float(context, value):
    return _reinterpreting(types.int16, types.float32, ("fptrunc", ir.HalfType()), ("bitcast", ir.IntType(16)))


@intrinsic
def added(context, total, left, right):
    """total + left·right, the one sum that may be fused and reordered into vector lanes: anywhere else that could rearrange W − Δ."""

    def build(context, builder, signature, args):
        total, left, right = args
        return builder.fadd(total, builder.fmul(left, right, flags=("contract",)), flags=("reassoc", "nsz", "contract"))

    return types.float32(types.float32, types.float32, types.float32), build


u32, f32 = np.uint32, np.float32  # numba widens u32 + u32 to 64 bits, which halves the vectors: hence a u32() around each step


def decode(bits):
    """The float32 that 16 bits stand for."""


def encode(value, like):
    """A float32 rounded to nearest, ties to even, as 16 bits of the type of `like`."""


def encode_number(value, like):
    """`encode` where `value` isn't NaN, which costs bf16 a comparison."""


def infinity(like):
    """The bits of infinity: magnitudes from here on are infinite or NaN."""


def too_large(like):
    """The float32 bits of the least magnitude that rounds to infinity."""


@overload(decode)
def _decode(bits):
    return (lambda bits: float_of(u32(u32(bits) << u32(16)))) if bits == types.uint16 else (lambda bits: float_of_half(bits))


@overload(encode_number)
def _encode_number(value, like):
    def bf16(value, like):
        raw = bits_of(value)
        return np.uint16(u32(u32(raw + u32(0x7FFF) + u32((raw >> u32(16)) & u32(1))) >> u32(16)))

    return bf16 if like == types.uint16 else (lambda value, like: half_of_float(value))


@overload(encode)
def _encode(value, like):
    def bf16(value, like):
        raw = bits_of(value)
        return np.uint16(u32((raw >> u32(16)) | u32(0x40))) if magnitude(value) > u32(0x7F800000) else encode_number(value, like)

    return bf16 if like == types.uint16 else (lambda value, like: half_of_float(value))


@overload(infinity)
def _infinity(like):
    return (lambda like: u32(0x7F80)) if like == types.uint16 else (lambda like: u32(0x7C00))


@overload(too_large)
def _too_large(like):
    return (lambda like: u32(0x7F7F8000)) if like == types.uint16 else (lambda like: u32(0x477FF000))


@numba.njit
def magnitude(value):
    """The bits of a float32 without its sign, which order as the magnitudes do, NaN last."""
    return u32(bits_of(value) & u32(0x7FFFFFFF))


def _round_rows(old, delta, new, row, ratio, where, bits, sums):
    """One block of the merge.

    Args:
        old, new: bits [rows, cols], which may be the same memory. delta: float32 [rows, cols]. row: scratch bits [cols].
        ratio: results below ratio·max|Δ of the row| are too small to trust. where, bits: their flat index and old bits, filled from 0.
        sums: float64, what SUMS names, added to.
    Returns:
        How many results were too small to trust.
    """
    rows, cols = delta.shape
    found = 0
    for i in range(rows):
        row[:cols] = old[i]
        delta_sq, error_sq, error_dot, changed = f32(0), f32(0), f32(0), u32(0)
        edit, least, most = u32(0), u32(0xFFFFFFFF), u32(0)  # the largest |Δ|, the smallest and the largest |W − Δ|
        for j in range(cols):
            before = decode(row[j])
            after = f32(before - delta[i, j])
            rounded = encode_number(after, row[j])
            new[i, j] = rounded
            error = f32(f32(decode(rounded) - before) + delta[i, j])  # the bracket is exact where the edit is small
            delta_sq = added(delta_sq, delta[i, j], delta[i, j])
            error_sq = added(error_sq, error, error)
            error_dot = added(error_dot, error, delta[i, j])
            changed = u32(changed + u32(rounded != row[j]))
            edit = u32(max(edit, magnitude(delta[i, j])))
            least = u32(min(least, magnitude(after)))
            most = u32(max(most, magnitude(after)))
        # What follows is for rows with something odd in them, few enough that a second look at one costs nothing.
        if most >= too_large(row[0]):  # NaN and infinity stay where they were, and out of the sums
            delta_sq, error_sq, error_dot, changed = f32(0), f32(0), f32(0), u32(0)
            for j in range(cols):
                before = decode(row[j])
                new[i, j] = encode(f32(before - delta[i, j]), row[j])
                changed = u32(changed + u32(new[i, j] != row[j]))
                if u32(u32(row[j]) & u32(0x7FFF)) >= infinity(row[j]):
                    sums[5] += 1
                elif u32(u32(new[i, j]) & u32(0x7FFF)) >= infinity(row[j]):
                    sums[6] += 1
                else:
                    error = f32(f32(decode(new[i, j]) - before) + delta[i, j])
                    delta_sq = added(delta_sq, delta[i, j], delta[i, j])
                    error_sq = added(error_sq, error, error)
                    error_dot = added(error_dot, error, delta[i, j])
        largest = float_of(edit) if edit < u32(0x7F800000) else f32(0)
        limit = magnitude(f32(largest * ratio))
        if least < limit:
            for j in range(cols):
                if magnitude(f32(decode(row[j]) - delta[i, j])) < limit:
                    where[found], bits[found] = i * cols + j, row[j]
                    found += 1
        sums[0] += delta_sq
        sums[1] += error_sq
        sums[2] += error_dot
        sums[3] = max(sums[3], largest)
        sums[4] += changed
    return found


def _signature(half):
    return types.int64(
        half[:, ::1], types.float32[:, ::1], half[:, ::1], half[::1], types.float32, types.int64[::1], half[::1], types.float64[::1]
    )


round_rows = compiled(_round_rows, [_signature(half) for half in (types.uint16, types.int16)])
