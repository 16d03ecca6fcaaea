"""Every variant of the Triton merge against float64, on the GPU, or in Triton's interpreter with TRITON_INTERPRET=1.

    python -m sku_vllm.benchmarks.gpu_correctness [--small]

Prints a Markdown row a variant and exits with 1 where one is more than an ulp off. `gpu_day.sh` runs it; compute-sanitizer runs it with
--small. Open this file when the kernel gets another variant.
"""

import itertools
import sys
from collections.abc import Iterator

import torch

from sku_vllm.kernels.delta_merge import Merge, Summand, delta_merge_reference
from sku_vllm.kernels.delta_merge.fp8 import rows_of
from sku_vllm.kernels.delta_merge.reference import sum_terms
from sku_vllm.kernels.delta_merge.triton_kernel import delta_merge_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FACTORS = (torch.bfloat16, torch.float16, torch.float32)
# Rows and columns: tiles of both kinds, and edges that divide by nothing.
SHAPES, SMALL = ((1, 16), (64, 128), (515, 1032), (301, 77), (4096, 4096), (11008, 4096)), ((1, 16), (64, 128), (77, 131))
RANKS, FEW = (1, 8, 32, 64, 128, 256), (1, 33)


def variants(small: bool) -> Iterator[tuple[str, Merge, int | None]]:
    """(name, merge on the CPU, seed) of everything that the launcher can choose."""
    shapes, ranks = (SMALL, FEW) if small else (SHAPES, RANKS)
    for (rows, cols), weight, factor in itertools.product(shapes, DTYPES, FACTORS):
        old = (torch.randn(rows, cols) * 0.1).to(weight)
        dense = Summand((torch.randn(rows, cols) * 0.01).to(factor), None, 0.7071)
        yield f"{_short(weight)} {rows}×{cols}, dense {_short(factor)}", Merge(old, [dense]), None
        for rank in ranks:
            b, a = (torch.randn(rows, rank) * 0.02).to(factor), (torch.randn(rank, cols) * 0.1).to(factor)
            terms = [Summand(b, a, 0.7071)]
            yield f"{_short(weight)} {rows}×{cols}, rank {rank} {_short(factor)}", Merge(old, terms), None
        half = max(rows // 2, 1)
        yield f"{_short(weight)} {rows}×{cols}, a window", Merge(old, [terms[0]._replace(b=b[:half], row=rows - half)]), None
        if factor == torch.float32:
            yield f"{_short(weight)} {rows}×{cols}, stochastic", Merge(old, terms), 5
    scale = torch.rand(3, 2) * 0.01 + 0.005
    fp8 = (torch.randn(96, 128) * 20).to(torch.float8_e4m3fn)
    yield "fp8 96×128, blocks", Merge(fp8, [Summand(torch.randn(96, 8) * 0.02, torch.randn(8, 128) * 0.1, 5.0)], None, scale), None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def off_by(merge: Merge, seed: int | None) -> int:
    """The most ulps by which a variant differs: from float64, or from the reference where rounding is random."""
    moved = [term._replace(b=term.b.to(DEVICE), a=None if term.a is None else term.a.to(DEVICE)) for term in merge.terms]
    mine = merge.weight.to(DEVICE, copy=True)
    delta_merge_triton([Merge(mine, moved, scale=None if merge.scale is None else merge.scale.to(DEVICE))], seed=seed)
    found = mine.cpu()
    if seed is not None:
        wanted = torch.empty_like(merge.weight)
        delta_merge_reference(merge.weight, merge.terms, out=wanted, seed=seed)
        return int(not torch.equal(found, wanted))
    return int(_ulps(found, merge).max())


def _ulps(found: torch.Tensor, merge: Merge) -> torch.Tensor:
    """Ulps between what was found and W − Σ terms in float64, rounded once."""
    delta = torch.empty(merge.weight.shape, dtype=torch.float64)
    sum_terms([term._replace(a=None if term.a is None else term.a.double()) for term in merge.terms], 0, delta)
    exact = merge.weight.double()
    if merge.scale is not None:
        scales = rows_of(merge.scale, None, merge.weight.shape, 0, merge.weight.shape[0])
        over = scales.over(scales.new.double(), 0, *merge.weight.shape)
        exact = ((exact * over - delta) / over).clamp(-448, 448)
    else:
        exact = exact - delta
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.element_size()]

    def order(value: torch.Tensor) -> torch.Tensor:
        raw = value.contiguous().view(bits).long()
        return torch.where(raw < 0, -(raw & torch.iinfo(bits).max), raw)

    return (order(found) - order(exact.to(found.dtype))).abs()


def main() -> None:
    """Print the table; exit with 1 where a variant is off."""
    torch.manual_seed(0)
    small = "--small" in sys.argv or DEVICE == "cpu"
    worst, count = 0, 0
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU, in the interpreter"
    print(f"On {where}.\n\n| variant | most ulps off |\n|---|---:|")
    for name, merge, seed in variants(small):
        off = off_by(merge, seed)
        worst, count = max(worst, off), count + 1
        if off:
            print(f"| {name} | {off} |")
    print(f"| all {count} variants, at most | {worst} |")
    sys.exit(int(worst > 1))


if __name__ == "__main__":
    main()
