"""The model under attack, the unedited base to compare it with, and a context manager that undoes changes of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.measurement import Reference, as_backend
from sku_vllm.evaluate.opened import opened
from sku_vllm.model import edited_model, load_model, load_tokenizer


@dataclass(frozen=True, slots=True)
class Target:
    """A model, or base − scale·delta, with its tokenizer.

    Attributes:
        backend: its own decoder. reference: gives the unedited base; None without one.
        weights: it as plain weights in memory; None with --backend vllm, which keeps them to itself.
        base: the unedited base in memory; None where none is known, or with --backend vllm.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: Backend
    reference: Reference | None
    weights: PreTrainedModel | None
    base: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """Its plain weights. Raises ConfigError where they are not in memory."""
        if self.weights is None:
            raise ConfigError("--backend vllm: an attack changes weights in memory, which vLLM keeps to itself; leave --backend out")
        return self.weights

    def changed(self) -> "Restored":
        """A context manager: weights may be changed inside its block and are restored when it ends."""
        return Restored(self.model)


@contextmanager
def open_target(request: AttackRequest) -> Iterator[Target]:
    """The model of a request, in its backend, until the block ends."""
    if request.backend == "vllm":
        with opened(request) as engine:
            yield Target(engine.tokenizer, engine.backend(), engine.reference(), None)
        return
    spec, config = request.model, request.config
    model, reference, base = edited_model(spec), None, None
    if spec.reference is not None:
        base = load_model(spec.reference)
        unedited = as_backend(base, config)
        reference = lambda: nullcontext(unedited)  # noqa: E731
    yield Target(load_tokenizer(spec.model, spec.revision), as_backend(model, config), reference, model, base)


class Restored:
    """Restores the model's parameters, bit for bit, when the block ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> "Restored":
        self.saved = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        return self

    def __exit__(self, *error: object) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Restore the parameters now, for another change inside the block."""
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                tensor.copy_(self.saved[name])
