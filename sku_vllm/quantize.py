"""Simulate quantising a fused model: how much of the edit W − W' is left in Q(W) − Q(W').

Open this file to add a quantiser to `sku fuse --simulate`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sku_vllm.errors import ConfigError
from sku_vllm.kernels.delta_merge import MergeStats, Summand
from sku_vllm.kernels.delta_merge.reference import sum_terms

GROUP = 128


def int4(weight: Tensor) -> Tensor:
    """Symmetric round-to-nearest to −7 … 7, one scale per 128 elements of a row (the last group may be shorter)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP)
    return _round(padded, padded.abs().amax(-1, keepdim=True) / 7).view(rows, -1)[:, :columns]


def int8(weight: Tensor) -> Tensor:
    """Symmetric round-to-nearest to −127 … 127, one scale per output row."""
    return _round(weight, weight.abs().amax(1, keepdim=True) / 127)


def fp8(weight: Tensor) -> Tensor:
    """float8_e4m3fn, one scale per output row."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).round() * scale


QUANTISERS = {"int4": int4, "int8": int8, "fp8": fp8}


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """`kinds` without repetitions. Raises ConfigError naming the first unknown one."""
    for kind in kinds:
        if kind not in QUANTISERS:
            raise ConfigError(f"--simulate {kind}: unknown; choose from {', '.join(QUANTISERS)}")
    return tuple(dict.fromkeys(kinds))


def simulate(
    before: Tensor, after: Tensor, terms: Sequence[Summand], quantisers: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, MergeStats]:
    """For each quantiser, the sums from which MergeStats computes `retained` and `noise`.

    Args:
        before, after: rows [rows, cols] of the base and of the merged weight. terms: the edit between them.
        quantisers: by kind, from a float32 weight to what is left of it.
    """
    delta = torch.empty(before.shape, dtype=torch.float32)
    sum_terms(terms, 0, delta)
    result = {}
    for kind, quantise in quantisers.items():
        result[kind] = left_of(delta, quantise(before.float()) - quantise(after.float()))
    return result


def left_of(delta: Tensor, kept: Tensor) -> MergeStats:
    """The sums from which MergeStats computes `retained` and `noise`. delta: the edit; kept: the difference that is left of it."""
    finite = kept.isfinite()  # a NaN or infinity in the base spoils its quantisation group, which the sums leave out
    lost, edit = (torch.where(finite, value, 0).double().reshape(-1) for value in (delta - kept, delta))
    return MergeStats(delta_sq=float(edit @ edit), error_sq=float(lost @ lost), error_dot=float(lost @ edit), elements=delta.numel())
