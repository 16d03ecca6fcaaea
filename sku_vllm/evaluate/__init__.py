"""Questions put to a model, and what its answers were worth. `evaluate_model` takes paths, `measure` a model in memory."""

from typing import Any

from sku_vllm.evaluate.config import EvalConfig

__all__ = ["EvalConfig", "EvalReport", "adapter_off", "evaluate_model", "measure"]

_HOMES = {"EvalReport": "measurement", "measure": "measurement", "evaluate_model": "evaluate", "adapter_off": "evaluate"}


def __getattr__(name: str) -> Any:
    """Torch and transformers load when a measurement is asked for, not when a reader beside it is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"sku_vllm.evaluate.{_HOMES[name]}"), name)
