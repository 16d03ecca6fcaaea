"""What the compiled Triton kernel can reach at most, read from its machine code: no GPU is needed, and none has confirmed it yet.

    python -m sku_vllm.benchmarks.roofline [--capability 90] [--output FILE]

The kernel is compiled for a GPU that need not be here. Its SASS says how many instructions and bytes a tile of a weight takes: inside the
loop over tiles once, inside the loop over the rank once for every 32. Beside the memory's bandwidth that gives two bounds, of which the
slower holds. The prediction assumes that the two overlap perfectly, so a measured run can only be slower. Open this file to predict
another GPU, rank or shape.
"""

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sku_vllm.kernels.delta_merge.launch_table import ALIGNED_TILE

# NVIDIA's data sheets: multiprocessors, clock in GHz, memory in GB/s, of which a copy reaches about 0.92.
GPUS = {"H100 SXM": (132, 1.755, 3350), "H200 SXM": (132, 1.755, 4800), "A100 SXM 80 GB": (108, 1.41, 2039)}
CAPABILITY = {"H100 SXM": 90, "H200 SXM": 90, "A100 SXM 80 GB": 80}
COPY, SCHEDULERS, WARPS, THREADS = 0.92, 4, 8, 256
REGISTERS, WARPS_AT_MOST, SHARED = 65536, 64, {80: 164, 90: 228}
RANKS = (8, 16, 32, 64, 128)
GOAL = 0.92  # of a copy's bandwidth, for ranks up to 64
SHAPES = ((4096, 4096), (11008, 4096), (8192, 28672), (2560, 2560))
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)")
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)\.E(?:\.\w+)*?(?:\.(U8|U16|64|128))?(?:\.\w+)*\s")
WIDTH = {"U8": 1, "U16": 2, None: 4, "64": 8, "128": 16}


@dataclass(frozen=True, slots=True)
class Code:
    """One variant's machine code.

    Attributes:
        registers: of a thread. shared: bytes a block. spilled: bytes of registers that went to memory.
        tile, step: instructions of a warp outside and inside the loop over the rank. tile_bytes, step_bytes: global memory accesses of
        a block there, in bytes.
    """

    registers: int
    shared: int
    spilled: int
    tile: int
    step: int
    tile_bytes: int
    step_bytes: int

    def occupancy(self, capability: int) -> float:
        """Share of a multiprocessor's warps that fit at once."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        by_shared = SHARED[capability] * 1024 // max(self.shared + 1024, 1)
        return min(by_registers, by_shared, WARPS_AT_MOST // WARPS) * WARPS / WARPS_AT_MOST


def compile_variant(capability: int, factor: torch.dtype) -> Code:
    """Compile the float32 pass over aligned bf16 weights for one GPU generation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sku_vllm.kernels.delta_merge import triton_kernel as k

    constants = k.constants((torch.bfloat16, torch.bfloat16, factor, False, True), double=False, stochastic=False)
    signature = dict.fromkeys(k.delta_merge_kernel.arg_names, "constexpr")
    signature |= {
        "table": "*i64",
        "coefficients": "*fp64",
        "sums": "*fp32",
        "which": "*i64",
        "parts": "i32",
        "entries": "i32",
        "seed": "i64",
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(4)}
    source = ASTSource(k.delta_merge_kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=k.OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass, usage = _tool("nvdisasm", "-c", str(cubin)), _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    found = {name: int(number) for name, number in re.findall(r"(REG|SHARED|LOCAL|STACK):(\d+)", usage)}
    return Code(found["REG"], compiled.metadata.shared, found.get("LOCAL", 0), *_count(sass))


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _count(sass: str) -> tuple[int, int, int, int]:
    """(instructions of a warp in the loop over tiles, in the loop over the rank, bytes of a block in either).

    A loop is what a backward branch spans. The loop over tiles is the longest; that over the rank the longest inside it that multiplies
    matrices. The search for a tile's matrix, a few steps of a few instructions, counts once.
    """
    lines = [line for line in sass.splitlines() if re.match(r"\s*(\.L_x_\d+:|/\*[0-9a-f]{4,}\*/)", line)]
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = [(labels[match[1]], at) for at, line in enumerate(lines) if (match := BRANCH.search(line)) and labels.get(match[1], at) < at]
    outer = max(loops, key=lambda loop: loop[1] - loop[0])
    multiplying = [loop for loop in loops if loop != outer and any("HMMA" in line or "GMMA" in line for line in lines[slice(*loop)])]
    inner = max(multiplying, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    step, whole = lines[slice(*inner)], lines[slice(*outer)]
    counts = [sum("/*" in line for line in part) for part in (whole, step)]
    bytes_ = [sum(WIDTH[match[2]] * THREADS for line in part for match in ACCESS.finditer(line)) for part in (whole, step)]
    return counts[0] - counts[1], counts[1], bytes_[0] - bytes_[1], bytes_[1]


def predict(code: Code, gpu: str, shape: tuple[int, int], rank: int, factor_bytes: int) -> tuple[float, str]:
    """(share of a copy's bandwidth, what bounds it) of a merge of one shape at best."""
    processors, clock, memory = GPUS[gpu]
    rows, columns = shape
    tiles = math.ceil(rows / ALIGNED_TILE[0]) * math.ceil(columns / ALIGNED_TILE[1])
    copied = 4 * rows * columns
    moving = (copied + rank * (rows + columns) * factor_bytes) / (memory * COPY)
    instructions = WARPS * tiles * (code.tile + code.step * math.ceil(rank / 32))
    issuing = instructions / (processors * SCHEDULERS * clock)
    return copied / (memory * COPY) / max(moving, issuing), "memory" if moving >= issuing else "instructions"


def page(capability: int) -> Iterator[str]:
    """The lines of the page."""
    import triton

    yield "# Roofline of the Triton merge, from its machine code\n"
    yield (
        f"triton {triton.__version__}, compiled for sm_{capability}; no GPU has run it. bf16 weights, tiles of {ALIGNED_TILE[0]} × "
        f"{ALIGNED_TILE[1]}. Made by `python -m sku_vllm.benchmarks.roofline`. A measured share above the predicted one would refute the\n"
        "count; one far below it points to latency, which this page leaves out: look at occupancy first. Everything here is a prediction.\n"
    )
    yield (
        "Bytes count every thread of a load, also where all read one number of the table (about three bytes an element).\n\n"
        "| factors | registers | shared memory | spilled | occupancy | bytes an element: weight, factors of 32 ranks "
        "| instructions an element: tile, 32 ranks |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    codes: dict[str, Any] = {}
    elements = ALIGNED_TILE[0] * ALIGNED_TILE[1]
    for name, factor in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        code = codes[name] = compile_variant(capability, factor)
        yield (
            f"| {name} | {code.registers} | {code.shared / 1024:.0f} KiB | {code.spilled} B | {code.occupancy(capability):.0%} "
            f"| {code.tile_bytes / elements:.2f}, {code.step_bytes / elements:.2f} "
            f"| {32 * WARPS * code.tile / elements:.1f}, {32 * WARPS * code.step / elements:.1f} |"
        )
    yield "\nPredicted share of a copy's bandwidth at best (i: bounded by instructions, else by memory):\n"
    gpus = [gpu for gpu in GPUS if CAPABILITY[gpu] == capability]
    yield "| GPU | shape | factors | " + " | ".join(f"r {rank}" for rank in RANKS) + " | measured |"
    yield "|---|---|---|" + "---:|" * len(RANKS) + "---|"
    within: list[float] = []
    for gpu in gpus:
        for shape in SHAPES:
            for name, width in (("bf16", 2), ("fp32", 4)):
                shares = [predict(codes[name], gpu, shape, rank, width) for rank in RANKS]
                cells = " | ".join(f"{share:.0%}{' i' * (bound == 'instructions')}" for share, bound in shares)
                yield f"| {gpu} | {shape[0]} × {shape[1]} | {name} | {cells} | not measured |"
                within += [share for rank, (share, _) in zip(RANKS, shares, strict=True) if rank <= 64]
    told = "within reach" if max(within) >= GOAL else "out of reach of this code, if the count holds: instructions come first"
    yield f"\nThe goal is {GOAL:.0%} for r ≤ 64. Predicted at best: {min(within):.0%} to {max(within):.0%}, so it is {told}."


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90, choices=sorted(set(CAPABILITY.values())))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = "\n".join(page(options.capability)) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
