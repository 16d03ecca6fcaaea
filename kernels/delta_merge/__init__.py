"""W' = round(W − Σ coefficient·(B@A)): the definition in torch; a grouped Triton launch for what lies on a GPU."""

from sku_vllm.kernels.delta_merge.reference import MergeStats, Term, delta_merge_reference

__all__ = ["MergeStats", "Term", "delta_merge_reference"]
