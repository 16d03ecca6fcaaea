"""A model opened for measurement, in memory or in vLLM: itself, the same edit at other scales, and the base to compare it with.

Open this file to change how `--backend` becomes a model; `vllm_backend.py` has the other one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.measure_request import MeasureRequest
from sku_vllm.evaluate.measurement import Reference, as_backend
from sku_vllm.evaluate.per_layer import layers_of, scale_layers
from sku_vllm.evaluate.unedited_base import adapter_off, other_model
from sku_vllm.model import load_model, load_tokenizer, set_scale
from sku_vllm.model_spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Opened(Protocol):
    """A model that a `ModelSpec` describes, ready to answer."""

    tokenizer: "PreTrainedTokenizerBase"

    @property
    def layers(self) -> list[str]:
        """The numbers of the layers that the adapter edits. Raises ConfigError where they cannot be scaled one by one."""
        ...

    def backend(self) -> Backend:
        """The model at the scale of its spec."""
        ...

    def at(self, scale: float, layers: Mapping[str, float] | None = None) -> Backend:
        """base − scale·factor·delta, until the next call. layers: the factor of each layer by its number; 1 where none is given."""
        ...

    def reference(self) -> Reference | None:
        """The base to compare with: another model if the spec names one, else this one without its adapter; None without either."""
        ...


class InMemory:
    """An `Opened` of transformers."""

    def __init__(self, spec: ModelSpec, config: EvalConfig) -> None:
        self._spec, self._config, self._scale = spec, config, spec.strength
        self.tokenizer, self._model = load_tokenizer(spec.model, spec.revision), load_model(spec)

    @property
    def layers(self) -> list[str]:
        """See `Opened`."""
        return layers_of(self._model)

    def backend(self) -> Backend:
        """See `Opened`."""
        return as_backend(self._model, self._config)

    def at(self, scale: float, layers: Mapping[str, float] | None = None) -> Backend:
        """See `Opened`."""
        self._scale = scale
        set_scale(self._model, scale)
        if layers:
            scale_layers(self._model, scale, layers)
        return self.backend()

    def reference(self) -> Reference | None:
        """See `Opened`."""
        if self._spec.base is None and self._spec.adapter is not None:
            return adapter_off(self._model, self._scale, self._config)
        return other_model(self._spec.reference, self._config)


@contextmanager
def opened(request: MeasureRequest) -> Iterator[Opened]:
    """The model of a request in its backend, until the block ends.

    Raises:
        ConfigError: vLLM is not installed, or cannot run this adapter or quantization.
    """
    if request.backend == "vllm":
        from sku_vllm.evaluate.vllm_backend import open_vllm

        with open_vllm(request.model, request.tensor_parallel_size, request.quantization) as engine:
            yield engine
    else:
        yield InMemory(request.model, request.config)
