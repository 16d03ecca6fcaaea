"""Rounding inside the kernel, bit for bit as torch and `stochastic.py` round."""

import triton
import triton.language as tl


@triton.jit
def nearest(value, T: tl.constexpr, INTERPRETED: tl.constexpr):
    """Ties to even. On a GPU it is one instruction; the interpreter's own conversion to bf16 drops the low bits, so there it is done by hand."""
    if INTERPRETED and T == tl.bfloat16:
        single = value.to(tl.float32)
        if value.dtype == tl.float64:  # round to odd first, so that the second rounding sees what the first one dropped
            bits = single.to(tl.int32, bitcast=True)
            past = tl.abs(single.to(tl.float64)) > tl.abs(value)
            bits = tl.where(past, bits - 1, bits)
            bits = tl.where(single.to(tl.float64) == value, bits, bits | 1)
            single = tl.where(tl.abs(value) < float("inf"), bits.to(tl.float32, bitcast=True), single)
        bits = single.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7F800000) == 0x7F800000, single, rounded).to(tl.bfloat16)
    return value.to(T)


@triton.jit
def stochastic(value, element, seed, T: tl.constexpr, KEPT: tl.constexpr, NORMAL: tl.constexpr):
    """float64 `value` to T, which keeps KEPT mantissa bits and whose smallest normal number is NORMAL; see `stochastic_round`."""
    DROP: tl.constexpr = 52 - KEPT
    noise = _hash32(element.to(tl.uint32) ^ seed.to(tl.uint32)).to(tl.int64)
    if DROP > 32:
        noise = noise << (DROP - 32)
    else:
        noise = noise >> (32 - DROP)
    magnitude = tl.abs(value)
    normal = tl.full([], NORMAL, tl.float64)
    lift = tl.where(magnitude < normal, normal, normal * 0)
    bits = ((magnitude + lift).to(tl.int64, bitcast=True) + noise) & -(1 << DROP)
    rounded = bits.to(tl.float64, bitcast=True) - lift
    sign = value.to(tl.int64, bitcast=True) & -(1 << 63)
    signed = (rounded.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    return tl.where(magnitude < float("inf"), signed, value).to(tl.float32).to(T)  # exact, so twice is once


@triton.jit
def _hash32(x):
    """lowbias32, as in `stochastic.py`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
