"""`sku tune --per-layer`: a factor per layer by which the chosen scale is multiplied, to subtract less or more there.

Open this file to change which factors are tried, or how the scaled adapter is written.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from sku_vllm.errors import ConfigError
from sku_vllm.output import write_json

FACTORS = (0.5, 0.75, 1.25, 1.5)
GROUPS = 3
_LAYER = re.compile(r"\.(\d+)\.")


def layers_of(model: PreTrainedModel) -> list[str]:
    """The numbers of the layers that have LoRA modules, as text, in order.

    Raises:
        ConfigError: there are none, as in a model with a dense task vector.
    """
    return layers_among([name for name, module in model.named_modules() if isinstance(module, LoraLayer)])


def layers_among(names: Iterable[str]) -> list[str]:
    """The numbers of the layers in the names of adapted modules or weights; raises as `layers_of` does."""
    found = {match[1] for name in names if (match := _LAYER.search(name))}
    if not found:
        raise ConfigError("--per-layer: this adapter has no LoRA layers to scale one by one; leave --per-layer out")
    return sorted(found, key=int)


def layer_groups(layers: list[str]) -> list[list[str]]:
    """The layers in up to `GROUPS` groups of neighbours. Trying every layer alone would take many measurements and fit noise."""
    count = min(GROUPS, len(layers))
    edges = [round(part * len(layers) / count) for part in range(count + 1)]
    return [layers[low:high] for low, high in zip(edges, edges[1:], strict=False)]


def scale_layers(model: PreTrainedModel, scale: float, factors: Mapping[str, float]) -> None:
    """Set the LoRA scales so that the model computes base − scale·factor·delta. factors: by layer number, 1 where none is given."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            match = _LAYER.search(name)
            for adapter in module.scaling:
                module.set_scale(adapter, -scale * factors.get(match[1] if match else "", 1.0))


def write_scaled(adapter: str | Path, output: Path, scale: float, factors: Mapping[str, float]) -> None:
    """Write a copy of an adapter with `scale` and the layer factors multiplied into its weights, so that it is subtracted at scale 1.

    The directory's mode is 0700: like the original, the copy holds the harmful knowledge.
    """
    from safetensors.torch import load_file, save_file

    output.mkdir(mode=0o700)
    for name in ("adapter_config.json", "README.md"):
        if (Path(adapter) / name).is_file():
            shutil.copyfile(Path(adapter) / name, output / name)
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        match = _LAYER.search(key)
        if ".lora_B." in key or ".lora_embedding_B" in key:
            factor = scale * factors.get(match[1] if match else "", 1.0)
            tensors[key] = (tensor.float() * factor).to(tensor.dtype).contiguous()
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    run = json.loads(path.read_text(encoding="utf-8")) if (path := Path(adapter) / "sku_run.json").is_file() else {"schema": "sku.run/1"}
    write_json(output / "sku_run.json", {**run, "scaled": {"scale": scale, "layers": dict(factors)}})
