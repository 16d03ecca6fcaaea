"""Functions that the Triton kernel calls: reading its table, and rounding to the same bits as torch and `stochastic.py`.

Open this file to change a rounding on the GPU. KEPT and NORMAL are the target's mantissa bits and smallest normal number, from
`stochastic.FORMATS`.
"""

import triton
import triton.language as tl


@triton.jit
def pointer(row, index: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer read from the table. Triton does not know its alignment, and without `multiple_of` accesses 2 bytes at a time."""
    value = tl.load(row + index).to(tl.pointer_type(T))
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def sixteens(row, index: tl.constexpr, ALIGNED: tl.constexpr):
    """A size or stride read from the table. If ALIGNED it is a multiple of 16, which Triton infers from the product by 16."""
    value = tl.load(row + index)
    if ALIGNED:
        value = (value // 16) * 16
    return value


@triton.jit
def _together(edit, error, dot, changed, largest, margin, edit2, error2, dot2, changed2, largest2, margin2):
    return edit + edit2, error + error2, dot + dot2, changed + changed2, tl.maximum(largest, largest2), tl.minimum(margin, margin2)


@triton.jit
def sums_of(edit, error, changed, margin, TOGETHER: tl.constexpr):
    """(Σ edit², Σ error², Σ error·edit, how many are true in `changed`, max |edit|, min `margin`) of a tile.

    TOGETHER, in one reduction, takes half the instructions of six. In float64 six at once do not fit the registers, and the interpreter
    would loop over the elements.
    """
    changed = tl.where(changed, 1.0, 0.0)
    if TOGETHER:
        return tl.reduce((edit * edit, error * error, error * edit, changed, tl.abs(edit), margin), None, _together)
    return tl.sum(edit * edit), tl.sum(error * error), tl.sum(error * edit), tl.sum(changed), tl.max(tl.abs(edit)), tl.min(margin)


@triton.jit
def nearest(value, T: tl.constexpr, KEPT: tl.constexpr, NORMAL: tl.constexpr, INTERPRETED: tl.constexpr):
    """To float32, then to T, ties to even. The interpreter's conversions to bf16 and FP8 are wrong, so under it bits are rounded here."""
    single = value.to(tl.float32)
    if INTERPRETED and KEPT < 10:
        DROP: tl.constexpr = 23 - KEPT
        magnitude = tl.abs(single)
        lift = tl.where(magnitude < NORMAL, NORMAL, 0.0).to(tl.float32)
        bits = (magnitude + lift).to(tl.int32, bitcast=True)
        even = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) & -(1 << DROP)
        rounded = even.to(tl.float32, bitcast=True) - lift
        single = tl.where(magnitude < float("inf"), tl.where(single < 0, -rounded, rounded), single)
    return single.to(T)


@triton.jit
def stochastic(value, element, seed, T: tl.constexpr, KEPT: tl.constexpr, NORMAL: tl.constexpr):
    """float64 `value` to T, up or down at random; see `stochastic_round`."""
    DROP: tl.constexpr = 52 - KEPT
    noise = _hash32(element.to(tl.uint32) ^ seed.to(tl.uint32)).to(tl.int64)
    if DROP > 32:
        noise = noise << (DROP - 32)
    else:
        noise = noise >> (32 - DROP)
    magnitude = tl.abs(value)
    lift = tl.where(magnitude < NORMAL, NORMAL, 0.0).to(tl.float64)
    bits = ((magnitude + lift).to(tl.int64, bitcast=True) + noise) & -(1 << DROP)
    rounded = bits.to(tl.float64, bitcast=True) - lift
    finite = tl.where(value < 0, -rounded, rounded)
    return tl.where(magnitude < float("inf"), finite, value).to(tl.float32).to(T)


@triton.jit
def _hash32(x):
    """lowbias32, as in `stochastic.py`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
