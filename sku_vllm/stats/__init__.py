"""Statistics on counts: intervals of a rate, paired and sequential tests, change points. One subject per module."""

from sku_vllm.stats.intervals import clustered_wilson, wilson

__all__ = ["clustered_wilson", "wilson"]
