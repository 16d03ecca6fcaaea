"""Measuring a model: the functions behind `sku eval`, `sku tune` and `sku attack`.

`evaluate_model`, `tune_scale` and `attack_model` take a request; `measure` takes a model in memory.
"""

import importlib
from typing import Any

_HOMES = {
    "AttackConfig": "attack.attack_config",
    "AttackReport": "attack.attack_model",
    "AttackRequest": "attack.attack_request",
    "EvalConfig": "eval_config",
    "EvalReport": "measurement",
    "EvalRequest": "measure_request",
    "Limits": "limits",
    "Questions": "measure_request",
    "TuneReport": "tune",
    "TuneRequest": "tune_request",
    "adapter_off": "unedited_base",
    "attack_model": "attack.attack_model",
    "evaluate_model": "evaluate",
    "measure": "measurement",
    "tune_scale": "tune",
}
__all__ = list(_HOMES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing this package loads neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sku_vllm.evaluate.{_HOMES[name]}"), name)
