"""The delta merge as one grouped, persistent Triton launch over a table of matrices.

Every program takes tiles of all matrices in turn, so a whole model is one launch per combination of dtypes. Sums are float32 (float32
factors as three tf32 products, "tf32x3"; bf16 and fp16 factors enter the tensor cores exactly). The result is within an ulp of a float64
sum, except where it is small beside the terms that were summed. A tile with such an element, or with one that is not finite, is not
stored but noted, and a second launch computes the noted tiles with float64 sums: about 1 % of all tiles for an edit of 0.3 % of the
weight. fp32 weights and stochastic rounding need more than float32 sums can give, and use float64 sums throughout. Open this file to
change the GPU's merge.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sku_vllm.kernels.delta_merge.fp8 import CLIPPED, FP8_MAX
from sku_vllm.kernels.delta_merge.launch_table import ALIGNED_TILE, FIELDS, MASKED_TILE, Entry, Kind, entries_of
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats
from sku_vllm.kernels.delta_merge.stochastic import FORMATS
from sku_vllm.kernels.delta_merge.triton_helpers import nearest, pointer, sixteens, stochastic, sums_of

BLOCK_K = 32
# No fused multiply-add: a product and a sum rounded as one would differ from the reference. Triton's default differs by version.
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
SUMS = 9  # per tile: ΣΔ², Σe², Σe·Δ, changed, nonfinite, overflowed, clipped, noted, max |Δ|
NOTED, LARGEST = 7, 8
TL = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float8_e4m3fn: tl.float8e4nv,
}
# Assumed bound on the error of float32 sums over the rank, relative to ‖row of b‖·‖column of a‖.
ERROR = 2.0**-21
_FP8_MAX, _CLIPPED = tl.constexpr(FP8_MAX), tl.constexpr(CLIPPED)
_FIELDS, _SUMS = tl.constexpr(FIELDS), tl.constexpr(SUMS)


# Not specialised on sizes: for a 1 or a multiple of 16 the kernel would be compiled again in the middle of the work.
@triton.jit(do_not_specialize=["parts", "entries", "seed"])
def delta_merge_kernel(
    table, coefficients, sums, which, parts, entries, seed,
    W: tl.constexpr, R: tl.constexpr, F: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    DOUBLE: tl.constexpr, KEPT: tl.constexpr, NORMAL: tl.constexpr, DOUBTFUL: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute W − Σ terms for every tile of the table's matrices, store it rounded, and store each tile's sums.

    With DOUBLE the tiles in `which` are computed in float64; else all are, and one with an element that is too small to trust or not finite
    is noted, not stored.
    """
    C: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    FP8: tl.constexpr = tl.float8e4nv == W
    CAREFUL: tl.constexpr = not DOUBLE and not FP8
    for work in range(tl.program_id(0), parts, tl.num_programs(0)):
        tile = work // PARTS
        if DOUBLE:
            tile = tl.load(which + tile).to(tl.int32)
        low, high = 0, entries
        while high - low > 1:  # the last matrix whose first tile is not after this one
            middle = (low + high) // 2
            before = tl.load(table + middle * _FIELDS + 16) <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        row = table + low * _FIELDS  # its numbered columns are named in launch_table.py
        rows, rank = tl.load(row + 5), sixteens(row, 7, ALIGNED)
        cols = sixteens(row, 6, ALIGNED)
        local = (tile - tl.load(row + 16)).to(tl.int32)
        across = tl.cdiv(cols, BN * PARTS).to(tl.int32)
        m = (local // across) * BM + tl.arange(0, BM)
        n = ((local % across) * PARTS + work % PARTS) * BN + tl.max_contiguous(tl.multiple_of(tl.arange(0, BN), BN), BN)
        inside = (m < rows)[:, None] & (n < cols)[None, :]

        b_pointer = pointer(row, 2, F, ALIGNED)
        b_lead = sixteens(row, 10, ALIGNED)
        coefficient = tl.load(coefficients + low).to(C)
        if DENSE:
            dense = tl.load(b_pointer + m[:, None] * b_lead + n[None, :], mask=inside, other=0.0)
            delta = (dense if tl.float64 == F else dense.to(tl.float32)).to(C) * coefficient
            doubtful = DOUBTFUL * tl.abs(delta)
        else:
            a_pointer = pointer(row, 3, F, ALIGNED)
            a_lead = sixteens(row, 11, ALIGNED)
            delta = tl.zeros((BM, BN), dtype=C)
            b_squares, a_squares = tl.zeros((BM, BK), dtype=tl.float32), tl.zeros((BK, BN), dtype=tl.float32)
            for start in range(0, rank, BK):
                k = start + tl.arange(0, BK)
                b = tl.load(b_pointer + m[:, None] * b_lead + k[None, :], mask=(m < rows)[:, None] & (k < rank)[None, :], other=0.0)
                a = tl.load(a_pointer + k[:, None] * a_lead + n[None, :], mask=(k < rank)[:, None] & (n < cols)[None, :], other=0.0)
                if CAREFUL:
                    b_single, a_single = b.to(tl.float32), a.to(tl.float32)
                    b_squares += b_single * b_single
                    a_squares += a_single * a_single
                if DOUBLE or INTERPRETED:  # the interpreter multiplies with numpy, which has no bf16
                    b, a = b.to(tl.float32).to(C), a.to(tl.float32).to(C)
                delta = tl.dot(b, a, delta, input_precision=PRECISION, out_dtype=C)
            delta = delta * coefficient
            if CAREFUL:
                share = DOUBTFUL * tl.abs(coefficient)
                doubtful = (share * tl.sqrt(tl.sum(b_squares, 1)))[:, None] * tl.sqrt(tl.sum(a_squares, 0))[None, :]

        lead = sixteens(row, 8, ALIGNED)
        old = tl.load(pointer(row, 1, W, ALIGNED) + m[:, None] * lead + n[None, :], mask=inside, other=0.0)
        value = old.to(tl.float32).to(C)
        if FP8:
            scale_at = (m // tl.load(row + 13))[:, None] * tl.load(row + 12) + (n // tl.load(row + 14))[None, :]
            scale = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)) + scale_at, mask=inside, other=1.0).to(C)
            new_scale = tl.load(tl.load(row + 17).to(tl.pointer_type(tl.float32)) + scale_at, mask=inside, other=1.0).to(C)
            value = value * scale
        target = value - delta
        fitting = target
        if FP8:
            scaled = target / new_scale
            fitting = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -_FP8_MAX), _FP8_MAX), scaled)
        if STOCHASTIC:
            element = tl.load(row + 15) + m[:, None].to(tl.int64) * cols + n[None, :]
            new = stochastic(fitting, element, seed, R, KEPT, NORMAL)
        else:
            new = nearest(fitting, R, KEPT, NORMAL, INTERPRETED)
        kept = new.to(tl.float32).to(C)
        if FP8:
            kept = kept * new_scale
        changed = kept.to(tl.float32).to(tl.int32, bitcast=True) != value.to(tl.float32).to(tl.int32, bitcast=True)
        # Beyond a matrix's edge all of these are 0.
        error, edit, where, noted = kept - target, delta, sums + work * _SUMS, False
        if CAREFUL:
            margins = tl.abs(target) - doubtful
            edit_sq, error_sq, error_dot, changes, largest, margin = sums_of(edit, error, changed, margins, not INTERPRETED)
            # An element too small to trust has a negative margin, and one that is not finite an error whose square is not.
            noted = (margin < 0) | ((error_sq < float("inf")) == 0)
        else:
            base_finite = tl.abs(value) < float("inf")  # false for NaN too
            finite = base_finite & (tl.abs(kept) < float("inf"))
            error, edit = tl.where(finite, error, 0.0), tl.where(finite, edit, 0.0)
            edit_sq, error_sq, error_dot, changes, largest, _ = sums_of(edit, error, changed, edit, False)
            tl.store(where + 4, tl.sum((base_finite == 0).to(tl.float32)))
            tl.store(where + 5, tl.sum((base_finite & (finite == 0)).to(tl.float32)))
        if FP8:
            tl.store(where + 6, tl.sum((inside & (tl.abs(scaled) > _CLIPPED)).to(tl.float32)))
        tl.store(where, edit_sq)
        tl.store(where + 1, error_sq)
        tl.store(where + 2, error_dot)
        tl.store(where + 3, changes)
        tl.store(where + 7, tl.where(noted, 1.0, 0.0))
        tl.store(where + 8, largest)
        if noted == 0:
            out_lead = sixteens(row, 9, ALIGNED)
            tl.store(pointer(row, 0, R, ALIGNED) + m[:, None] * out_lead + n[None, :], new, mask=inside)


def delta_merge_triton(merges: Sequence[Merge], *, seed: int | None = None) -> list[MergeStats]:
    """W' = round(W − Σ terms) for every merge, one launch per combination of dtypes.

    Weights are [rows, cols] with contiguous rows (any stride between them), on one CUDA device, or on the CPU under
    TRITON_INTERPRET=1. Terms may cover windows of rows (q, k and v inside a packed weight); several on the same rows are summed.

    Raises:
        ValueError: shapes, dtypes, strides or devices that don't fit.
    """
    if len({merge.weight.device for merge in merges}) > 1:
        raise ValueError("all weights must be on one device; merge those of each device by themselves")
    totals = [MergeStats(elements=merge.weight.numel()) for merge in merges]
    groups: dict[Kind, list[Entry]] = {}
    for index, merge in enumerate(merges):
        for entry in entries_of(index, merge, seed):
            groups.setdefault(entry.kind, []).append(entry)
    for entries in groups.values():
        edges = [0]
        for entry in entries:
            edges.append(edges[-1] + entry.tiles)
        if edges[-1]:
            _add(_launch(entries, edges, seed), entries, edges, totals)
    return totals


def _launch(entries: Sequence[Entry], edges: Sequence[int], seed: int | None) -> Tensor:
    """Run the kernel over all tiles of entries of one kind. Returns the sums of every tile, float64 [tiles, SUMS], on the CPU."""
    kind, device, tiles = entries[0].kind, entries[0].weight.device, edges[-1]
    table = torch.tensor([entry.row(first) for entry, first in zip(entries, edges, strict=False)], dtype=torch.int64).to(device)
    coefficients = torch.tensor([entry.coefficient for entry in entries], dtype=torch.float64).to(device)
    interpreted = device.type == "cpu"
    programs = 2 if interpreted else 2 * torch.cuda.get_device_properties(device).multi_processor_count

    def run(which: Tensor, double: bool) -> Tensor:
        """Sums of the tiles in `which`, all of them unless `double`."""
        settings = constants(kind, double=double, stochastic=seed is not None, interpreted=interpreted)
        work = which.numel() * settings["PARTS"]
        sums = torch.zeros((work, SUMS), dtype=torch.float32, device=device)
        delta_merge_kernel[(min(work, programs),)](
            table, coefficients, sums, which, work, len(entries), 0 if seed is None else seed & 0xFFFFFFFF,
            **settings, **OPTIONS,
        )  # fmt: skip
        parts = sums.cpu().double().view(-1, settings["PARTS"], SUMS)
        return torch.cat([parts[:, :, :LARGEST].sum(1), parts[:, :, LARGEST:].amax(1)], 1)

    every = torch.arange(tiles, device=device)
    if torch.float32 in kind[:2] or seed is not None:
        return run(every, True)
    found = run(every, False)
    noted = found[:, NOTED].nonzero().flatten()
    if noted.numel():
        found[noted] = run(noted.to(device), True)
    return found


def constants(kind: Kind, *, double: bool, stochastic: bool, interpreted: bool = False) -> dict[str, Any]:
    """What one variant of the kernel is compiled for; `kind` as of `Entry`."""
    weight, out, factor, dense, aligned = kind
    tile, (kept, normal) = ALIGNED_TILE if aligned else MASKED_TILE, FORMATS[out]
    # Pieces that a tile's columns are cut into, where float64 sums or FP8 scales of the whole tile would not fit the registers.
    parts = 2 if weight == torch.float8_e4m3fn else 4 if double else 1
    return {
        "W": TL[weight], "R": TL[out], "F": TL[factor], "DENSE": dense, "ALIGNED": aligned, "STOCHASTIC": stochastic, "DOUBLE": double,
        # An ulp is at least 2^-(kept + 1) of a number.
        "KEPT": kept, "NORMAL": normal, "DOUBTFUL": ERROR * 2.0 ** (kept + 1),
        "PRECISION": "tf32x3" if factor == torch.float32 and not double else "ieee", "INTERPRETED": interpreted,
        "BM": tile[0], "BN": tile[1] // parts, "BK": BLOCK_K, "PARTS": parts,
    }  # fmt: skip


def _add(sums: Tensor, entries: Sequence[Entry], edges: Sequence[int], totals: list[MergeStats]) -> None:
    """Add each tile's sums to its merge's totals, in tile order and without atomics, so that the result is the same every time."""
    for entry, low, high in zip(entries, edges, edges[1:], strict=False):
        delta_sq, error_sq, error_dot, changed, nonfinite, overflowed, clipped, _, _ = sums[low:high].sum(0).tolist()
        largest = float(sums[low:high, LARGEST].max())
        totals[entry.merge].add(
            MergeStats(delta_sq, error_sq, error_dot, 0, int(changed), largest, int(nonfinite), int(overflowed), int(clipped))
        )
