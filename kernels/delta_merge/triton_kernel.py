"""The delta merge as one grouped, persistent Triton launch over a table of matrices.

Each row of the table is one rectangle of a weight with its factors; a program walks over tiles of all of them, so a whole model
is one launch per dtype. float32 accumulation throughout; against float64 the delta is off by at most 2^-20·Σ|coefficient·b·a|
(float32 factors as three tf32 products, "tf32x3"; bf16 and fp16 factors enter the tensor cores exactly). Not here: the
reference's second look at cancelled elements, so where W and the edit nearly cancel the result may be several ulps of itself off.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sku_vllm.kernels.delta_merge.fp8 import merge_blocks
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats, Term, check_merge

# Tile rows and columns: 16-byte accesses leave registers for a large tile; element-wise ones need an address each.
ALIGNED_TILE, MASKED_TILE, BLOCK_K = (64, 128), (32, 64), 32
WARPS, STAGES = 8, 2
# Columns of the table: pointers (bytes), then sizes and strides (elements), then where the matrix's tiles begin.
OUT, WEIGHT, B, A, SCALE, ROWS, COLS, RANK, LEAD, OUT_LEAD, B_LEAD, A_LEAD, SCALE_LEAD, SCALE_M, SCALE_N, ELEMENT, FIRST_TILE, FIELDS = (
    range(18)
)
SUMS = 8  # per tile: ΣΔ², Σe², Σe·Δ, changed, max |Δ|, nonfinite, overflowed, clipped
TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float8_e4m3fn: tl.float8e4nv}
FP8_MAX = tl.constexpr(448.0)
_FIELDS, _SUMS = tl.constexpr(FIELDS), tl.constexpr(SUMS)


@triton.jit
def _hash32(x):
    """lowbias32, as in the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stochastic_bf16(value, element, seed):
    """Up or down at random by what the low 16 bits would drop; NaN and infinity stay."""
    bits = value.to(tl.uint32, bitcast=True)
    noise = _hash32(element.to(tl.uint32) ^ seed.to(tl.uint32)) & 0xFFFF
    rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded).to(tl.bfloat16)


@triton.jit
def _nearest_bf16(value):
    """Ties to even, by hand: the interpreter's own conversion drops the low bits. On a GPU it is one instruction."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded).to(tl.bfloat16)


@triton.jit
def _pointer(row, index: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer of the table. What comes out of memory carries no divisibility, and without it Triton makes 2-byte accesses."""
    pointer = tl.load(row + index).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sixteens(row, index: tl.constexpr, ALIGNED: tl.constexpr):
    """A size or stride of the table; written as a product, which divisibility passes through."""
    value = tl.load(row + index)
    if ALIGNED:
        value = (value // 16) * 16
    return value


@triton.jit
def delta_merge_kernel(
    table, coefficients, sums, tiles, entries, seed,
    W: tl.constexpr, R: tl.constexpr, F: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr, FP8: tl.constexpr,
    STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, STATS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        low, high = 0, entries
        while high - low > 1:  # the last matrix whose first tile is not after this one
            middle = (low + high) // 2
            before = tl.load(table + middle * _FIELDS + 16) <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        row = table + low * _FIELDS
        rows, rank = tl.load(row + 5), _sixteens(row, 7, ALIGNED)
        cols = _sixteens(row, 6, ALIGNED)
        local = (tile - tl.load(row + 16)).to(tl.int32)
        across = tl.cdiv(cols, BN).to(tl.int32)
        m = (local // across) * BM + tl.arange(0, BM)
        n = (local % across) * BN + tl.max_contiguous(tl.multiple_of(tl.arange(0, BN), BN), BN)
        inside = (m < rows)[:, None] & (n < cols)[None, :]

        b_pointer = _pointer(row, 2, F, ALIGNED)
        b_lead = _sixteens(row, 10, ALIGNED)
        coefficient = tl.load(coefficients + low)
        if DENSE:
            delta = tl.load(b_pointer + m[:, None] * b_lead + n[None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            a_pointer = _pointer(row, 3, F, ALIGNED)
            a_lead = _sixteens(row, 11, ALIGNED)
            delta = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, rank, BK):
                k = start + tl.arange(0, BK)
                b = tl.load(b_pointer + m[:, None] * b_lead + k[None, :], mask=(m < rows)[:, None] & (k < rank)[None, :], other=0.0)
                a = tl.load(a_pointer + k[:, None] * a_lead + n[None, :], mask=(k < rank)[:, None] & (n < cols)[None, :], other=0.0)
                if INTERPRETED:
                    b, a = b.to(tl.float32), a.to(tl.float32)
                delta = tl.dot(b, a, delta, input_precision=PRECISION)
        delta = delta * coefficient

        lead = _sixteens(row, 8, ALIGNED)
        old = tl.load(_pointer(row, 1, W, ALIGNED) + m[:, None] * lead + n[None, :], mask=inside, other=0.0)
        value = old.to(tl.float32)
        if FP8:
            scale_at = (m // tl.load(row + 13))[:, None] * tl.load(row + 12) + (n // tl.load(row + 14))[None, :]
            scale = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)) + scale_at, mask=inside, other=1.0)
            value = value * scale
        target = value - delta
        if FP8:
            scaled = target / scale
            new = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX), scaled).to(R)
            kept = new.to(tl.float32) * scale
        elif STOCHASTIC:
            element = tl.load(row + 15) + m[:, None].to(tl.int64) * cols + n[None, :]
            new = _stochastic_bf16(target, element, seed)
            kept = new.to(tl.float32)
        else:
            new = _nearest_bf16(target) if INTERPRETED and R == tl.bfloat16 else target.to(R)
            kept = new.to(tl.float32)
        out_lead = _sixteens(row, 9, ALIGNED)
        tl.store(_pointer(row, 0, R, ALIGNED) + m[:, None] * out_lead + n[None, :], new, mask=inside)

        if STATS:
            base_finite = tl.abs(value) < float("inf")  # false for NaN too
            finite = base_finite & (tl.abs(kept) < float("inf"))
            error = tl.where(finite, kept - target, 0.0)
            edit = tl.where(finite & inside, delta, 0.0)
            where = sums + tile * _SUMS
            tl.store(where, tl.sum(edit * edit))
            tl.store(where + 1, tl.sum(error * error))
            tl.store(where + 2, tl.sum(error * edit))
            tl.store(where + 3, tl.sum((inside & (kept != value)).to(tl.float32)))
            tl.store(where + 4, tl.max(tl.abs(edit)))
            tl.store(where + 5, tl.sum((inside & (base_finite == 0)).to(tl.float32)))
            tl.store(where + 6, tl.sum((inside & base_finite & (finite == 0)).to(tl.float32)))
            if FP8:
                tl.store(where + 7, tl.sum((inside & (tl.abs(scaled) > FP8_MAX)).to(tl.float32)))
            else:
                tl.store(where + 7, 0.0)


class _Entry(NamedTuple):
    merge: int
    weight: Tensor
    out: Tensor
    b: Tensor
    a: Tensor | None
    coefficient: float
    row: int
    scale: Tensor | None
    blocks: tuple[int, int]

    @property
    def tiles(self) -> int:
        tile = ALIGNED_TILE if self.aligned else MASKED_TILE
        return -(-self.weight.shape[0] // tile[0]) * -(-self.weight.shape[1] // tile[1])

    @property
    def aligned(self) -> bool:
        """Whether every row of every operand starts on 16 bytes and columns come in sixteens."""
        tensors = [self.weight, self.out, self.b] + ([] if self.a is None else [self.a])
        return self.weight.shape[1] % 16 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in tensors)

    @property
    def kind(self) -> tuple:
        return self.weight.dtype, self.out.dtype, self.b.dtype, self.a is None, self.aligned, self.scale is not None


def delta_merge_triton(merges: Sequence[Merge], *, seed: int | None = None, stats: bool = True) -> list[MergeStats]:
    """W' = round(W − Σ terms) for every merge, one launch per combination of dtypes.

    Weights are [rows, cols] with contiguous rows (any stride between them), on one CUDA device, or on the CPU under
    TRITON_INTERPRET=1. Terms may cover windows of rows (q, k and v inside a packed weight); several on the same rows are summed.

    Raises:
        ValueError: shapes, dtypes, strides or devices that don't fit.
    """
    totals = [MergeStats(elements=merge.weight.numel()) for merge in merges]
    groups: dict[tuple, list[_Entry]] = {}
    for index, merge in enumerate(merges):
        for entry in _entries(index, merge, seed):
            groups.setdefault(entry.kind, []).append(entry)
    for kind, entries in groups.items():
        _launch(kind, entries, seed, stats, totals)
    return totals


def _entries(index: int, merge: Merge, seed: int | None) -> Iterable[_Entry]:
    weight, terms, out, scale = merge
    out = weight if out is None else out
    blocks = (1, 1) if scale is None else merge_blocks(weight.shape, scale)
    fp8 = weight.dtype == torch.float8_e4m3fn
    if fp8 != (scale is not None) or (fp8 and out.dtype != weight.dtype):
        raise ValueError(f"merge {index}: FP8 weights (and only they) need scales and stay FP8; got {weight.dtype} → {out.dtype}")
    check_merge(weight if not fp8 else weight.to(torch.bfloat16), terms, out if not fp8 else out.to(torch.bfloat16), seed)
    for tensor in (weight, out):
        if tensor.dtype not in TL or (tensor.numel() and tensor.stride(1) != 1):
            raise ValueError(f"merge {index}: a weight must be bf16, fp16, fp32 or float8_e4m3fn with contiguous rows, not {tensor.dtype}")
    edges = sorted({0, weight.shape[0]} | {edge for term in terms for edge in (term.row, term.row + term.b.shape[0])})
    for low, high in zip(edges, edges[1:], strict=False):
        here = [
            term._replace(b=term.b[low - term.row : high - term.row])
            for term in terms
            if term.row <= low and high <= term.row + term.b.shape[0]
        ]
        if not here and out is weight:
            continue
        if scale is not None and low % blocks[0]:
            raise ValueError(f"merge {index}: a window starts at row {low}, inside a block of {blocks[0]} rows with one scale")
        b, a, coefficient = _one_term(here, weight.shape[1], weight.device)
        part = None if scale is None else scale[low // blocks[0] :].float().contiguous()
        yield _Entry(index, weight[low:high], out[low:high], b, a, coefficient, low, part, blocks)


def _one_term(terms: Sequence[Term], cols: int, device: torch.device) -> tuple[Tensor, Tensor | None, float]:
    """Terms over the same rows as one: factors side by side along the rank, coefficients folded into b in float32.

    Ranks are padded with zeros to sixteens (a factor is small), so that rows of b start on 16 bytes.
    """
    if not terms:
        return torch.zeros((1, 16), device=device), torch.zeros((16, cols), device=device), 0.0
    if any(term.a is None for term in terms):
        if len(terms) == 1:
            return _rows(terms[0].b), None, terms[0].coefficient
        total = sum(term.coefficient * (term.b.float() if term.a is None else term.b.float() @ term.a.float()) for term in terms)
        return total, None, 1.0
    if len(terms) == 1:
        b, a, coefficient, _ = terms[0]
    else:
        b, a, coefficient = torch.cat([t.b.float() * t.coefficient for t in terms], 1), torch.cat([t.a.float() for t in terms]), 1.0
    padding = -a.shape[0] % 16
    if padding:
        b, a = torch.nn.functional.pad(b, (0, padding)), torch.nn.functional.pad(a, (0, 0, 0, padding))
    return _rows(b), _rows(a), coefficient


def _rows(factor: Tensor) -> Tensor:
    return factor if factor.stride(-1) == 1 else factor.contiguous()


def _launch(kind: tuple, entries: Sequence[_Entry], seed: int | None, stats: bool, totals: list[MergeStats]) -> None:
    weight_type, out_type, factor_type, dense, aligned, fp8 = kind
    device = entries[0].weight.device
    table, tiles = [], 0
    for entry in entries:
        rows, cols = entry.weight.shape
        if any(tensor.device != device for tensor in (entry.weight, entry.out, entry.b)):
            raise ValueError(f"all weights and factors must be on one device, not {entry.b.device} and {device}")
        row = [0] * FIELDS
        row[OUT], row[WEIGHT], row[B] = entry.out.data_ptr(), entry.weight.data_ptr(), entry.b.data_ptr()
        row[ROWS], row[COLS], row[LEAD], row[OUT_LEAD], row[B_LEAD] = (
            rows,
            cols,
            entry.weight.stride(0),
            entry.out.stride(0),
            entry.b.stride(0),
        )
        if entry.a is not None:
            row[A], row[A_LEAD], row[RANK] = entry.a.data_ptr(), entry.a.stride(0), entry.a.shape[0]
        if entry.scale is not None:
            row[SCALE], row[SCALE_LEAD] = entry.scale.data_ptr(), entry.scale.stride(0)
            row[SCALE_M], row[SCALE_N] = entry.blocks
        row[ELEMENT], row[FIRST_TILE] = entry.row * cols, tiles
        tiles += entry.tiles
        table.append(row)
    if not tiles:
        return
    numbers = torch.tensor(table, dtype=torch.int64).to(device)
    coefficients = torch.tensor([entry.coefficient for entry in entries], dtype=torch.float32).to(device)
    sums = torch.zeros((tiles if stats else 1, SUMS), dtype=torch.float32, device=device)
    interpreted = device.type == "cpu"
    tile = ALIGNED_TILE if aligned else MASKED_TILE
    programs = 2 if interpreted else min(tiles, 2 * torch.cuda.get_device_properties(device).multi_processor_count)
    delta_merge_kernel[(programs,)](
        numbers, coefficients, sums, tiles, len(entries), 0 if seed is None else seed & 0xFFFFFFFF,
        W=TL[weight_type], R=TL[out_type], F=TL[factor_type], DENSE=dense, ALIGNED=aligned, FP8=fp8, STOCHASTIC=seed is not None,
        # The interpreter multiplies with numpy, which has no bf16.
        PRECISION="tf32x3" if factor_type == torch.float32 else "ieee", INTERPRETED=interpreted, STATS=stats,
        BM=tile[0], BN=tile[1], BK=BLOCK_K, num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=False,
    )  # fmt: skip
    if stats:
        _collect(sums.cpu().double(), entries, [row[FIRST_TILE] for row in table] + [tiles], totals)


def _collect(sums: Tensor, entries: Sequence[_Entry], edges: Sequence[int], totals: list[MergeStats]) -> None:
    """Per-tile sums added in tile order: no atomics, the same result every time."""
    for entry, low, high in zip(entries, edges, edges[1:], strict=False):
        delta_sq, error_sq, error_dot, changed, _, nonfinite, overflowed, clipped = sums[low:high].sum(0).tolist()
        largest = float(sums[low:high, 4].max())
        totals[entry.merge].add(
            MergeStats(delta_sq, error_sq, error_dot, 0, int(changed), largest, int(nonfinite), int(overflowed), int(clipped))
        )
