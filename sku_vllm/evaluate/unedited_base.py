"""Gives a measurement access to the unedited base, for perplexity ratios and the likelihood rule of gibberish."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.measurement import Reference, as_backend
from sku_vllm.model import load_model, set_scale
from sku_vllm.model_spec import ModelSpec


def adapter_off(model: PreTrainedModel, scale: float, config: EvalConfig) -> Reference:
    """The base as the edited model with its adapter's scale set to 0; after the block the scale is `scale` again."""

    @contextmanager
    def opened() -> Iterator[Backend]:
        set_scale(model, 0.0)
        try:
            yield as_backend(model, config)
        finally:
            set_scale(model, scale)

    return opened


def other_model(spec: ModelSpec | None, config: EvalConfig) -> Reference | None:
    """The base as a separate model, loaded when the block begins; None without a spec."""
    if spec is None:
        return None

    @contextmanager
    def opened() -> Iterator[Backend]:
        yield as_backend(load_model(spec), config)

    return opened
