"""`sku demo`: train, tune, fuse, measure and serve on the built-in lab."""

from sku_vllm.demo.demo import DemoConfig, run_demo, stage_count

__all__ = ["DemoConfig", "run_demo", "stage_count"]
