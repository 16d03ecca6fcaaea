"""The measure of `gpu_correctness`: what it takes for right is what the reference computes, for every variant that it goes through."""

import torch

from sku_vllm.benchmarks.gpu_correctness import _ulps, variants
from sku_vllm.kernels.delta_merge import delta_merge_reference
from sku_vllm.kernels.delta_merge.fp8 import delta_merge_fp8_reference, rows_of


def test_the_reference_is_right_in_every_variant() -> None:
    torch.manual_seed(0)
    seen = set()
    for name, merge, seed in variants(small=True):
        if seed is not None:
            continue
        found = torch.empty_like(merge.weight)
        if merge.scale is None:
            delta_merge_reference(merge.weight, merge.terms, out=found)
        else:
            scales = rows_of(merge.scale, None, merge.weight.shape, 0, merge.weight.shape[0])
            delta_merge_fp8_reference(merge.weight, merge.terms, scales, out=found)
        assert _ulps(found, merge).max() <= 1, name
        wrong = found.clone()
        wrong[-1, -1] = -4.0 if found[-1, -1].float() > 0 else 4.0
        assert _ulps(wrong, merge).max() > 1, name
        seen.add(merge.weight.dtype)
    assert len(seen) == 4
