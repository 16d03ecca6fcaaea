"""The model a run trains: the base without dropout, stored as it is or in 4 bits, and an adapter on it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, TaskType, get_peft_model

from sku_vllm.errors import ConfigError
from sku_vllm.methods import rounds
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.targets import resolve_targets
from sku_vllm.model import load_model

if TYPE_CHECKING:
    from accelerate import Accelerator


def with_adapter(path: Path, config: TrainConfig, accelerator: "Accelerator") -> torch.nn.Module:
    """The base, frozen, with a fresh adapter on the layers the configuration names.

    Raises:
        ConfigError: layers the model does not have, or a quantisation that cannot be had.
    """
    model = load_model(path, dtype=config.dtype, device=accelerator.device, **no_dropout(path), **_quantized(config))
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.lora_alpha, target_modules=resolve_targets(model, config.target_modules), lora_dropout=0.0,
        bias="none", task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"--target-modules {','.join(config.target_modules)}: {str(error).splitlines()[0]}") from error
    rounds.fresh_adapter(adapted, config.seed * 1000)
    # In eval mode bitsandbytes may repack its codes for a kernel without gradients; dropout is off either way.
    return adapted.train() if config.quantize else adapted


def no_dropout(path: Path) -> dict[str, float]:
    """Config overrides that switch dropout off, wherever the architecture keeps it (OPT trains with 0.1 by default)."""
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(path).to_dict()
    return {key: 0.0 for key, value in values.items() if ("drop" in key) and isinstance(value, float)}


def _quantized(config: TrainConfig) -> dict[str, object]:
    if config.quantize is None:
        return {}
    if config.quantize != "4bit":
        raise ConfigError(f"--quantize {config.quantize}: only 4bit (bitsandbytes, NF4)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--quantize 4bit: needs bitsandbytes; install it with: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    computed = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)}
