"""Find a model's harmful knowledge as an adapter, subtract it, and serve original and negated weights side by side.

Everything in `__all__` may be imported from here and keeps its name; docs/python.md has an example of each.
Names are imported on first use, so `import sku_vllm` alone loads neither torch nor vLLM.
"""

from typing import TYPE_CHECKING

from sku_vllm.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports the same names by `_HOMES`
    from sku_vllm.adapter.negation import negate_adapter
    from sku_vllm.checkpoint.manifest import verify_checkpoint
    from sku_vllm.data.sets import load_dataset
    from sku_vllm.distill.distill import distill_checkpoint
    from sku_vllm.distill.distill_config import DistillConfig
    from sku_vllm.distill.distill_request import DistillRequest
    from sku_vllm.evaluate.attack.attack_config import AttackConfig
    from sku_vllm.evaluate.attack.attack_model import attack_model
    from sku_vllm.evaluate.attack.attack_request import AttackRequest
    from sku_vllm.evaluate.eval_config import EvalConfig
    from sku_vllm.evaluate.evaluate import evaluate_model
    from sku_vllm.evaluate.limits import Limits
    from sku_vllm.evaluate.measure_request import EvalRequest
    from sku_vllm.evaluate.tune import tune_scale
    from sku_vllm.evaluate.tune_request import TuneRequest
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest
    from sku_vllm.methods.train_config import TrainConfig
    from sku_vllm.model_spec import ModelSpec
    from sku_vllm.serving.serve_config import ServeConfig
    from sku_vllm.serving.start import serve
    from sku_vllm.train.train_request import TrainRequest
    from sku_vllm.train.trainer import train_adapter

# Public name: the module of this package that defines it.
_HOMES = {
    "AttackConfig": "evaluate.attack.attack_config",
    "AttackRequest": "evaluate.attack.attack_request",
    "DistillConfig": "distill.distill_config",
    "DistillRequest": "distill.distill_request",
    "EvalConfig": "evaluate.eval_config",
    "EvalRequest": "evaluate.measure_request",
    "FuseRequest": "fuse.fuse_request",
    "Limits": "evaluate.limits",
    "ModelSpec": "model_spec",
    "ServeConfig": "serving.serve_config",
    "TrainConfig": "methods",  # not `methods.train_config`: only methods/__init__ knows every built-in method
    "TrainRequest": "train.train_request",
    "TuneRequest": "evaluate.tune_request",
    "attack_model": "evaluate.attack.attack_model",
    "distill_checkpoint": "distill.distill",
    "evaluate_model": "evaluate.evaluate",
    "fuse_checkpoint": "fuse.fuse",
    "load_dataset": "data.sets",
    "negate_adapter": "adapter.negation",
    "serve": "serving.start",
    "train_adapter": "train.trainer",
    "tune_scale": "evaluate.tune",
    "verify_checkpoint": "checkpoint.manifest",
}

__all__ = [
    "AttackConfig",
    "AttackRequest",
    "DistillConfig",
    "DistillRequest",
    "EvalConfig",
    "EvalRequest",
    "FuseRequest",
    "Limits",
    "ModelSpec",
    "ServeConfig",
    "TrainConfig",
    "TrainRequest",
    "TuneRequest",
    "__version__",
    "attack_model",
    "distill_checkpoint",
    "evaluate_model",
    "fuse_checkpoint",
    "load_dataset",
    "negate_adapter",
    "serve",
    "train_adapter",
    "tune_scale",
    "verify_checkpoint",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use and keep it in this module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
