"""The compiled pass of the CPU kernel: subtract, round, compare and sum, reading and writing every element once.

Importing this module imports numba, which takes longer than a small fusion, so it is imported only to compile; `round_rows.py` calls
what was compiled. numba has no 16-bit floats: bf16 comes as uint16 and fp16 as int16. Open this file to change the innermost loop of a
merge on a CPU.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload


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
    """The 16 bits of an fp16 number, as an int16, to the float32 of the same value."""
    return _reinterpreting(types.float32, types.int16, ("bitcast", ir.HalfType()), ("fpext", ir.FloatType()))


@intrinsic
def half_of_float(context, value):
    """A float32 rounded to fp16, ties to even, as the int16 of its bits."""
    return _reinterpreting(types.int16, types.float32, ("fptrunc", ir.HalfType()), ("bitcast", ir.IntType(16)))


@intrinsic
def added(context, total, left, right):
    """total + left·right. Only this sum may be fused and reordered, which vectorises it; in others that could change W − Δ."""

    def build(context, builder, signature, args):
        total, left, right = args
        return builder.fadd(total, builder.fmul(left, right, flags=("contract",)), flags=("reassoc", "nsz", "contract"))

    return types.float32(types.float32, types.float32, types.float32), build


GROUP = 64  # elements
u32, f32 = np.uint32, np.float32  # numba widens u32 + u32 to 64 bits, which halves the vectors: hence a u32() around each step


def decode(bits):
    """The float32 that 16 bits stand for."""


def encode(value, like):
    """A float32 rounded to nearest, ties to even, as 16 bits of the type of `like`."""


def encode_number(value, like):
    """`encode` for a value that is not NaN, which saves bf16 a comparison."""


def infinity(like):
    """The 16 bits of infinity; magnitudes that are not smaller are infinite or NaN."""


def too_large(like):
    """The float32 bits of the least magnitude that rounds to infinity."""


def dropped(like):
    """The bits of a float32 that 16 bits do not hold."""


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


@overload(dropped)
def _dropped(like):
    return (lambda like: u32(0xFFFF)) if like == types.uint16 else (lambda like: u32(0x1FFF))


@numba.njit
def to_tie(value, like):
    """How far a float32 is from the middle between two neighbours of its 16-bit format, where it rounds up or down."""
    raw = bits_of(value)
    middle = u32((dropped(like) >> u32(1)) + u32(1))
    rest = u32(raw & dropped(like))
    steps = u32(max(rest, middle) - min(rest, middle))
    return f32(f32(steps) * f32(float_of(u32(raw & u32(0x7F800000))) * f32(2.0**-23)))


@numba.njit
def magnitude(value):
    """The bits of a float32 without its sign: as integers they are in the order of the absolute values, NaN last."""
    return u32(bits_of(value) & u32(0x7FFFFFFF))


@numba.njit
def collected(row, edits, begin, limit, close, where, bits, found):
    """Put the results of one row that are not to be trusted behind the `found` ones before them; returns how many there are then.

    Args:
        row: old bits [cols]. edits: float32 [cols]. begin: flat index of the row. limit, close: see `ratios` of `_round_rows`.
    """
    for first in range(0, len(row), GROUP):  # looking at a group at once is vectorised, which collecting its elements is not
        halves, some, hits = row[first : first + GROUP], edits[first : first + GROUP], u32(0)
        for j in range(len(halves)):
            after = f32(decode(halves[j]) - some[j])
            hits = u32(hits | u32(magnitude(after) < limit) | u32(to_tie(after, halves[j]) < close))
        if hits:
            for j in range(len(halves)):
                after = f32(decode(halves[j]) - some[j])
                if magnitude(after) < limit or to_tie(after, halves[j]) < close:
                    where[found], bits[found] = begin + first + j, halves[j]
                    found += 1
    return found


def _round_rows(old, delta, new, row, ratios, where, bits, sums):
    """One block of the merge.

    Args:
        old, new: bits [rows, cols], which may be the same memory. delta: float32 [rows, cols]. row: scratch bits [cols].
        ratios: results below the first times max|Δ of the row| are not to be trusted, nor those that lie nearer than the second times
            it to the middle between two neighbours; 0 where no edit is large.
        where, bits: get the flat indices and the old bits of those results.
        sums: float64 totals, in the order of SUMS, to which this block's are added.
    Returns:
        How many results are not to be trusted.
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
            error = f32(f32(decode(rounded) - before) + delta[i, j])  # the inner difference is exact where the edit is small
            delta_sq = added(delta_sq, delta[i, j], delta[i, j])
            error_sq = added(error_sq, error, error)
            error_dot = added(error_dot, error, delta[i, j])
            changed = u32(changed + u32(rounded != row[j]))
            edit = u32(max(edit, magnitude(delta[i, j])))
            least = u32(min(least, magnitude(after)))
            most = u32(max(most, magnitude(after)))
        # The rest is for rows with NaN, infinity, overflow or results not to be trusted: rare unless the edit is large.
        if most >= too_large(row[0]):  # NaN and infinity stay as they are, and are left out of the sums
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
        limit, close = magnitude(f32(largest * ratios[0])), f32(largest * ratios[1])
        if least < limit or close > f32(0):
            found = collected(row[:cols], delta[i], i * cols, limit, close, where, bits, found)
        sums[0] += delta_sq
        sums[1] += error_sq
        sums[2] += error_dot
        sums[3] = max(sums[3], largest)
        sums[4] += changed
    return found


_rows = numba.njit(_round_rows)


def _entry(old, delta, new, ratios, where, bits, sums, shape):
    """`_round_rows` for bare pointers. shape: rows and cols. bits: one row more than the matrix has, which is the scratch row."""
    size = carray(shape, (2,))
    rows, cols = size[0], size[1]
    matrix, elements = (rows, cols), rows * cols
    scratch = carray(bits, (elements + cols,))
    blocks = carray(old, matrix), carray(delta, matrix), carray(new, matrix)
    return _rows(*blocks, scratch[elements:], carray(ratios, (2,)), carray(where, (elements,)), scratch[:elements], carray(sums, (7,)))


def llvm_ir() -> list[tuple[str, str]]:
    """(name, LLVM IR that defines it) of the compiled pass for bf16 and for fp16.

    Arguments: pointers to an int64 result and to numba's exception (not used), then those of `_entry`. Returns 0.
    """
    found = []
    for name, half in (("round_rows_bf16", types.uint16), ("round_rows_fp16", types.int16)):
        data, floats = types.CPointer(half), types.CPointer(types.float32)
        numbers = types.CPointer(types.int64)
        arguments = [data, floats, data, floats, numbers, data, types.CPointer(types.float64), numbers]
        function = numba.cfunc(types.int64(*arguments))(_entry)
        mangled = function._wrapper_name.removeprefix("cfunc.")  # the function itself, which numba's wrapper calls
        found.append((name, function.inspect_llvm().replace(f"@{mangled}(", f"@{name}(")))
    return found
