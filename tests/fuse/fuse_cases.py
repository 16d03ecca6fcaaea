"""What the tests of fusing share: tiny models with LoRA adapters of PEFT, and base − delta by PEFT in float64."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, **IDS,
}  # fmt: skip
PREFIX = "base_model.model."


def llama(**changes: Any) -> Any:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **changes}))


def lora(model: Any, directory: Path, seed: int = 1, save: dict[str, Any] | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter of a copy of `model`; returns base − delta in float64, by parameter name. save: for save_pretrained."""
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 3, "lora_alpha": 7, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.save_pretrained(directory, **(save or {}))
    peft = peft.double()
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            module.scaling.update({name: -value for name, value in module.scaling.items()})
    return {name: value.clone() for name, value in peft.merge_and_unload().state_dict().items()}


def rekey(source: Path, target: Path, rename: Any) -> Path:
    """A copy of an adapter with other keys."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, target / "adapter_model.safetensors")
    return target


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def fuse(base: Path, adapter: Path, output: Path, scale: Any = 1.0, **options: Any) -> Any:
    """`sku fuse`."""
    return fuse_checkpoint(FuseRequest(base, [(adapter, scale)], output, **{"any_base": True, "digests": False, **options}))


def assert_equal(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    """Every tensor of `wanted` is that of `state`."""
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
