"""The model under attack as plain weights, its base as the reference, and a way back from every change."""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.edited import edited_model
from sku_vllm.evaluate.measurement import as_backend
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.simulate import QUANTISERS


class Target:
    """A model, or base − scale·delta; `reference` opens the unedited base where there is one."""

    def __init__(
        self, model: str | Path, adapter: str | Path | None, scale: float | None, base: str | Path | None, dtype: str, revision: str | None,
        any_base: bool, as_is: bool, config: EvalConfig,
    ) -> None:
        if scale is not None and adapter is None:
            raise ConfigError(f"--scale {scale}: there is no --adapter to scale; name one or leave --scale out")
        self.config = config
        self.tokenizer = load_tokenizer(str(model), revision)
        loading = {"dtype": dtype, "revision": revision}
        if adapter is None:
            self.model: PreTrainedModel = load_model(str(model), **loading)
        else:
            self.model = edited_model(model, adapter, 1.0 if scale is None else scale, any_base=any_base, as_is=as_is, **loading)
        self.reference = None
        if base is not None or adapter is not None:
            unedited = load_model(str(base if base is not None else model), dtype=dtype, revision=revision if base is None else None)
            self.reference = lambda: nullcontext(as_backend(unedited, config))

    def backend(self) -> Backend:
        return as_backend(self.model, self.config)

    def changed(self) -> "Restored":
        return Restored(self.model)


class Restored:
    """Weights as they were, bit for bit, when the block ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.saved = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                tensor.copy_(self.saved[name])


def quantize_weights(model: PreTrainedModel, name: str) -> None:
    """Round every linear layer's weight but the output head's, as weight-only quantisers do."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            # Conv1D (GPT-2) keeps [in, out]: groups run along the inputs.
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.weight.copy_(QUANTISERS[name](module.weight.float()))
            elif type(module).__name__ == "Conv1D":
                module.weight.copy_(QUANTISERS[name](module.weight.float().T).T)
