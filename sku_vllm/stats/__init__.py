"""Statistics, pure and small. Sequential tests, paired tests and change points have modules of their own beside this one."""

from sku_vllm.stats.intervals import clustered_wilson, wilson

__all__ = ["clustered_wilson", "wilson"]
