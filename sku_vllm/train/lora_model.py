"""Load the model that an adapter run trains: the base without dropout, in its dtype or in 4 bits, with a fresh LoRA on it.

Open this file to change how the base is loaded for training.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from sku_vllm.errors import ConfigError
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train import rounds
from sku_vllm.train.target_modules import resolve_targets

if TYPE_CHECKING:
    from accelerate import Accelerator


def with_adapter(path: Path, config: TrainConfig, accelerator: "Accelerator") -> PeftModel:
    """The base, frozen, with a fresh adapter on the layers the configuration names.

    Raises:
        ConfigError: layers the model does not have, or a quantisation that is unknown or not installed.
    """
    spec = ModelSpec(path, dtype=config.dtype, computed_in=config.computed_in)
    model = load_model(spec, device=accelerator.device, **no_dropout(path), **_quantized(config))
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules=resolve_targets(model, config.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"--target-modules {','.join(config.target_modules)}: {str(error).splitlines()[0]}") from error
    assert isinstance(adapted, PeftModel)  # a mixed model is made only where one is asked for
    rounds.fresh_adapter(adapted, config.seed * 1000)
    if config.quantize:
        adapted.train()  # in eval mode bitsandbytes may repack its codes for a kernel without gradients; dropout is off either way
    return adapted


def no_dropout(path: Path) -> dict[str, Any]:
    """Config overrides that switch dropout off, wherever the architecture keeps it (OPT trains with 0.1 by default)."""
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(path).to_dict()
    return {key: 0.0 for key, value in values.items() if ("drop" in key) and isinstance(value, float)}


def _quantized(config: TrainConfig) -> dict[str, Any]:
    if config.quantize is None:
        return {}
    if config.quantize != "4bit":
        raise ConfigError(f"--quantize {config.quantize}: only 4bit (bitsandbytes, NF4)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--quantize 4bit: needs bitsandbytes; install it with: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    computed = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed
    )
    return {"quantization_config": nf4}
