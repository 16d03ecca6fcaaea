"""Seeded stochastic rounding: the same float64 values round to the same bits on every backend, however a weight is cut up.

Open this file to add a dtype that can be rounded stochastically, or to change the random numbers (in `triton_helpers.py` as well).
"""

import torch
from torch import Tensor

# Mantissa bits a dtype keeps, and its smallest normal number, below which its spacing stops shrinking.
FORMATS = {torch.float32: (23, 2.0**-126), torch.bfloat16: (7, 2.0**-126), torch.float16: (10, 2.0**-14), torch.float8_e4m3fn: (3, 2.0**-6)}


def stochastic_round(value: Tensor, dtype: torch.dtype, seed: int, first_element: int) -> Tensor:
    """float64 `value` to `dtype`, up or down at random so that the mean is exact; NaN and infinity stay what they are.

    The noise of an element depends on `seed` and its index alone; `first_element` is the index of value's first one.
    """
    kept, normal = FORMATS[dtype]
    drop = 52 - kept
    index = torch.arange(first_element, first_element + value.numel(), dtype=torch.int64, device=value.device).reshape(value.shape)
    noise = hash32((index ^ (seed & 0xFFFFFFFF)) & 0xFFFFFFFF)
    noise = noise << (drop - 32) if drop > 32 else noise >> (32 - drop)
    magnitude = value.double().abs().contiguous()
    lift = torch.where(magnitude < normal, normal, 0.0)  # subnormals have the spacing of the smallest normal numbers
    rounded = (((magnitude + lift).view(torch.int64) + noise) & -(1 << drop)).view(torch.float64) - lift
    return torch.where(value.isfinite(), rounded.copysign(value), value).to(dtype)


def hash32(x: Tensor) -> Tensor:
    """`lowbias32` (nullprogram.com/blog/2018/07/31), on int64 holding 32 bits; the Triton kernel computes the same."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
