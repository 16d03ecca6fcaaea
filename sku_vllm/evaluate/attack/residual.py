"""What writes into the residual stream of a decoder, and a projection that keeps all of it from writing in some directions.

Open this file if abliteration does not find the writes of an architecture.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError

# Last parts of the names of modules and of packed experts that write: attention output and MLP output, by architecture.
WRITERS = frozenset(
    ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "wo", "w2", "fc_out", "attn_out", "ff_out")
)


@dataclass(frozen=True, slots=True)
class Write:
    """One tensor that is added to the stream. axis: the one that holds the stream. layer: its number; None: an embedding."""

    tensor: Tensor
    axis: int
    layer: int | None


def writes(model: PreTrainedModel) -> list[Write]:
    """Every write: token and position embeddings, and weights and biases of attention and MLP outputs.

    Raises:
        ConfigError: some layer's writes are not found.
    """
    width = int(model.config.get_text_config().hidden_size)
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    found = [
        Write(module.weight, 1, None)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and id(module) not in inside and module.weight.shape[1] == width
    ]
    for number, layer in enumerate(layers):
        own = list(_of_layer(layer, number, width))
        if sum(write.tensor.dim() > 1 for write in own) < 2:
            raise ConfigError(
                f"attack abliterate: {type(model).__name__}, layer {number}: attention and MLP output are not found under the names "
                f"{', '.join(sorted(WRITERS))}; add theirs to WRITERS in sku_vllm/evaluate/attack/residual.py"
            )
        found += own
    return found


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's layers. Raises ConfigError if there is no list of as many modules as the config has layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"attack abliterate: {type(model).__name__} has no list of {count} layers")


def _of_layer(layer: torch.nn.Module, number: int, width: int) -> Iterator[Write]:
    for name, tensor in layer.named_parameters():
        module, _, last = name.rpartition(".")
        writer = last if last in WRITERS else module.rpartition(".")[2]
        if writer not in WRITERS:
            continue
        if tensor.dim() == 1 and last == "bias":
            yield Write(tensor, 0, number)
        elif tensor.dim() > 1:
            conv = type(layer.get_submodule(module)).__name__ == "Conv1D"  # GPT-2 stores [inputs, outputs]
            packed = tensor.dim() == 3 and tensor.shape[1] != width  # experts stored [expert, inputs, outputs]
            yield Write(tensor, tensor.dim() - 1 if conv or packed else tensor.dim() - 2, number)


def project_out(model: PreTrainedModel, directions: Tensor | Mapping[int, Tensor], strength: float = 1.0) -> None:
    """Take `strength` times the part along some directions out of every write.

    Args:
        directions: orthonormal rows [directions, width]; or those of each layer by its number, from 0 (embeddings use layer 0's).
        strength: 1 removes the part, 2 would mirror it.
    """
    with torch.no_grad():
        for write in writes(model):
            rows = directions if isinstance(directions, Tensor) else directions[write.layer or 0]
            rows = rows.to(write.tensor.device)
            stream = write.tensor.float().movedim(write.axis, -1)
            stream = stream - strength * (stream @ rows.T) @ rows
            write.tensor.copy_(stream.movedim(-1, write.axis))
