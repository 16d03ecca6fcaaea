"""The delta merge W' = round(W − Σ coefficient·(B@A)), for many weights at once, on a CPU or a GPU.

`reference.py` says what is computed; `cpu*.py` and `round_rows.py` compute it on a CPU, `launch_table.py` and `triton_*.py` on a GPU.
"""

from collections.abc import Sequence

from sku_vllm.kernels.delta_merge.cpu import merge_on_cpu
from sku_vllm.kernels.delta_merge.fp8 import delta_merge_fp8_reference, merge_blocks, recomputed_scale
from sku_vllm.kernels.delta_merge.reference import Merge, MergeStats, Summand, delta_merge_reference

__all__ = [
    "Merge",
    "MergeStats",
    "Summand",
    "delta_merge",
    "delta_merge_fp8_reference",
    "delta_merge_reference",
    "merge_blocks",
    "recomputed_scale",
]


def delta_merge(merges: Sequence[Merge], *, seed: int | None = None) -> list[MergeStats]:
    """Merge every weight, in place unless it has an `out`: on a GPU one Triton launch per combination of dtypes, else on the CPU's cores.

    Args:
        merges: weights [rows, cols] with contiguous rows, all on one device, with terms on that device.
        seed: None rounds to nearest; a number rounds stochastically, alike on every backend.
    Returns:
        The statistics of each merge.
    Raises:
        ValueError: shapes, dtypes or devices that don't fit.
    """
    if merges and merges[0].weight.is_cuda:
        from sku_vllm.kernels.delta_merge.triton_kernel import delta_merge_triton

        return delta_merge_triton(merges, seed=seed)
    return merge_on_cpu(merges, seed)
