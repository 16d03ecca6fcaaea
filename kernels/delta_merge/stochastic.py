"""Stochastic rounding, seeded, the same bits on every backend and however a weight is cut up."""

import torch
from torch import Tensor


def stochastic_bf16(value: Tensor, seed: int, first_element: int) -> Tensor:
    """`value` to bf16, up or down at random so that the mean is exact; NaN and infinity stay what they are."""
    value = value.float()
    index = torch.arange(first_element, first_element + value.numel(), dtype=torch.int64).reshape(value.shape)
    noise = hash32((index ^ (seed & 0xFFFFFFFF)) & 0xFFFFFFFF) & 0xFFFF
    rounded = ((value.contiguous().view(torch.int32).to(torch.int64) + noise) & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def hash32(x: Tensor) -> Tensor:
    """`lowbias32` (nullprogram.com/blog/2018/07/31), on int64 holding 32 bits; the Triton kernel computes the same."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
