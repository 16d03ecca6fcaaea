"""A dense task vector on a loaded model: base − scale·delta in its own weights, at any scale in turn.

Open this file to change what `sku eval`, `tune` and `attack` do with the adapter of `sku train --full`.
"""

from typing import TYPE_CHECKING

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.adapter.delta import Dense
from sku_vllm.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DenseEdit:
    """A dense task vector on a model, with a copy of the base's tensors from which every scale is computed.

    Without the copy, rounding errors would add up: subtracting and adding back in bf16 does not restore the weights."""

    def __init__(self, model: "PreTrainedModel", adapter: LoraAdapter) -> None:
        own = dict(model.named_parameters())
        foreign = sorted(set(adapter.deltas) - set(own))
        if foreign:
            raise AdapterError(f"{adapter.path}: {len(foreign)} tensors the model does not have, for instance {foreign[0]}")
        self.parameters = {name: own[name] for name in adapter.deltas}
        self.base = {name: own[name].detach().clone() for name in adapter.deltas}
        self.delta = {name: delta.tensor() for name, delta in adapter.deltas.items() if isinstance(delta, Dense)}

    def apply(self, scale: float) -> None:
        """Set the weights to base − scale·delta."""
        import torch

        with torch.no_grad():
            for name, delta in self.delta.items():
                base = self.base[name]
                self.parameters[name].copy_(base.float() - scale * delta.to(base.device).float())
