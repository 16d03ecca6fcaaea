"""The compiled merge of 16-bit weights against float64 and against the reference: values, statistics, what it declines."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sku_vllm.kernels.delta_merge import Merge, MergeStats, Summand, delta_merge, delta_merge_reference
from sku_vllm.kernels.delta_merge.cpu import merge_rows
from sku_vllm.kernels.delta_merge.cpu_kernel import BITS, FEWEST, merge_16_bit
from sku_vllm.kernels.delta_merge.round_rows import SUMS, round_rows
from tests.kernels.test_delta_merge import exact, term, ulps


def assert_same_stats(stats: MergeStats, wanted: MergeStats) -> None:
    assert stats.elements == wanted.elements and stats.nonfinite == wanted.nonfinite and stats.overflowed == wanted.overflowed
    assert stats.changed == pytest.approx(wanted.changed, rel=1e-4, abs=2)
    assert stats.max_delta == pytest.approx(wanted.max_delta, rel=1e-5)
    assert stats.retained == pytest.approx(wanted.retained, rel=1e-5, abs=1e-5)
    assert stats.noise == pytest.approx(wanted.noise, rel=1e-3, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 2100),
    rank=st.integers(1, 64),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-3, 0.05, 1.0, 40.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_shape_is_within_one_ulp_and_sums_what_the_reference_sums(rows, cols, rank, seed, size, dtype):
    torch.manual_seed(seed)
    weight, terms = (torch.randn(rows, cols) + 0.1).to(dtype), [term(rows, cols, rank, size)]
    wanted, by_reference, out = exact(weight, terms), torch.empty_like(weight), torch.empty_like(weight)
    stats = merge_rows(weight, terms, out=out)
    assert weight.numel() < FEWEST or merge_16_bit(weight, terms, torch.empty_like(weight)) is not None
    assert_same_stats(stats, delta_merge_reference(weight, terms, out=by_reference))
    assert ulps(out, wanted).max() <= 1 and (out != by_reference).sum() <= 1 + 1e-4 * out.numel()
    in_place = weight.clone()
    merge_rows(in_place, terms)
    assert torch.equal(in_place, out)


def test_windows_several_adapters_and_dense_terms_sum_in_one_pass():
    torch.manual_seed(0)
    weight = torch.randn(600, 1500).bfloat16()  # more than one block
    terms = [term(200, 1500, 4), term(600, 1500, 7, 0.3), Summand(torch.randn(100, 1500), None, 0.01, 450)]
    wanted, by_reference, out = exact(weight, terms), torch.empty_like(weight), torch.empty_like(weight)
    stats = merge_16_bit(weight, terms, out)
    assert_same_stats(stats, delta_merge_reference(weight, terms, out=by_reference))
    assert ulps(out, wanted).max() <= 1 and (out != by_reference).float().mean() < 1e-4


@pytest.mark.parametrize(("dtype", "spare"), [(torch.bfloat16, 13), (torch.float16, 12)])
def test_what_cancels_is_summed_again_in_float64(dtype, spare):
    """Every 50th element of W is the edit itself rounded: W − Δ is what 16 bits lost of it, or less where the rounding was lucky."""
    torch.manual_seed(0)
    terms = [term(300, 1000, 64, 200.0)]
    delta = -exact(torch.zeros(300, 1000), terms)
    weight = (torch.randn(300, 1000) * 1000).to(dtype)
    weight.view(-1)[::50] = delta.to(dtype).view(-1)[::50]
    wanted, out = exact(weight, terms), torch.empty_like(weight)
    near = wanted.abs() < 2.0**-spare * delta.abs().max()
    assert near.sum() > 100
    assert merge_16_bit(weight, terms, out) is not None
    assert ulps(out, wanted).max() <= 1
    single = (weight.float() - terms[0].coefficient * (terms[0].b @ terms[0].a)).to(dtype)
    assert ulps(single, wanted)[near].max() > 1  # plain float32 would have failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bad_values_of_the_base_stay_where_they_are_and_stay_out_of_the_sums(dtype):
    torch.manual_seed(0)
    weight, terms = torch.randn(512, 64).to(dtype), [term(512, 64, 8, 0.1)]
    weight[3, 4], weight[5, 6], weight[7, 8] = float("nan"), float("inf"), -float("inf")
    out, wanted = torch.empty_like(weight), torch.empty_like(weight)
    assert_same_stats(merge_16_bit(weight, terms, out), delta_merge_reference(weight, terms, out=wanted))
    assert torch.equal(out.isfinite(), weight.isfinite()) and out[3, 4].isnan() and out[7, 8] == -float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_edit_is_reported_where_it_lands(dtype, bad):
    torch.manual_seed(0)
    weight, edit = torch.randn(64, 96).to(dtype), torch.randn(64, 96) * 0.01
    out, wanted, totals = torch.empty_like(weight), torch.empty_like(weight), np.zeros(len(SUMS))
    edit[5, 7] = bad
    where, kept = np.empty(64 * 96, np.int64), np.empty(65 * 96, BITS[dtype])
    bits = [matrix.view(torch.int16).numpy().view(BITS[dtype]) for matrix in (weight, out)]
    round_rows(bits[0], edit.numpy(), bits[1], np.zeros(2, np.float32), where, kept, totals)
    stats = MergeStats(elements=weight.numel(), **{name: kind(value) for (name, kind), value in zip(SUMS, totals, strict=True)})
    by_reference = delta_merge_reference(weight, [Summand(edit, None, 1.0)], out=wanted)
    edit[5] = 0  # the kernel leaves out a row, the reference a block
    assert_same_stats(stats, replace(by_reference, max_delta=float(edit.abs().max())))
    assert stats.overflowed == 1 and torch.equal(out.isfinite(), wanted.isfinite()) and (out.isfinite().sum() == out.numel() - 1)


def test_what_it_cannot_promise_it_leaves_to_the_reference():
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    kept = weight.clone()
    assert merge_16_bit(weight.float(), [term(64, 64, 8)], weight.float()) is None
    assert merge_16_bit(weight[:, :32], [term(64, 32, 8)], weight[:, :32]) is None, "rows that are not next to each other"
    assert torch.equal(weight, kept)
    top, edit = torch.full((64, 64), 3.38e38).bfloat16(), [Summand(torch.full((1, 64), -1e37), None, 1.0, 5)]
    assert merge_16_bit(top, edit, top) is None and delta_merge([Merge(top, edit)])[0].overflowed == 64
    full = torch.full((64, 64), 65504.0, dtype=torch.float16)
    assert merge_16_bit(full, [Summand(torch.full((1, 64), -5000.0), None, 1.0, 5)], full).overflowed == 64
    large = [term(64, 64, 8, 1e4)]
    wanted = exact(weight, large)
    assert merge_16_bit(weight, large, weight) is not None and ulps(weight, wanted).max() <= 1, "an edit larger than the weight"


@pytest.mark.parametrize("rank", [8, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_that_cancel_in_their_product_are_left_to_the_reference(dtype, rank):
    """Two halves of one adapter that are opposite but for a millionth: a small edit, of which float32 sums keep little."""
    torch.manual_seed(0)
    weight, (b, a, _, _) = (torch.randn(256, 1000) * 0.05).to(dtype), term(256, 1000, rank)
    terms = [Summand(torch.cat([1e3 * b, -1e3 * b * (1 + 1e-6)], 1), torch.cat([a, a]), 1.0)]
    assert merge_16_bit(weight, terms, torch.empty_like(weight)) is None
    wanted = exact(weight, terms)
    delta_merge([Merge(weight, terms)])
    assert ulps(weight, wanted).max() <= 1
    assert merge_16_bit((torch.randn(256, 1000) * 0.05).to(dtype), [term(256, 1000, rank, 0.01)], weight) is not None


def test_an_engine_can_start_where_weights_were_merged() -> None:
    """vLLM 0.32 reads the `__dict__` of every module's values when it starts on a CPU; llvmlite's library answered with a function."""
    values = [value for module in list(sys.modules.values()) for value in list(getattr(module, "__dict__", None) or {}.values())]
    assert "llvmlite.binding.ffi" in sys.modules and len(values) > 1000
    assert not [value for value in values if hasattr(value, "__dict__") and not hasattr(vars(value), "get")]
