"""Models and adapters in memory: loaded from safetensors, edited as base − scale·delta."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sku_vllm.checkpoint import checkpoint_directory
from sku_vllm.checkpoint_files import why_no_weights
from sku_vllm.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sku_vllm.adapter import LoraAdapter

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: itself, or the hub's snapshot of it (never its pickled files).

    Raises:
        CheckpointError: nothing there, no config, or only pickled weights (and how to convert them).
    """
    path = checkpoint_directory(model, revision)
    if not path.is_dir():
        raise CheckpointError(f"{model}: no such model directory")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: {why_no_weights(path)}")
    return path


def load_tokenizer(model: str | Path, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory or hub id. Runs no code from the repository."""
    from transformers import AutoTokenizer

    path = resolve_model(model, revision)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def context_length(config: "PreTrainedConfig") -> int | None:
    """Most tokens a model takes, or None where its config says nothing."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_config(path: Path) -> "PreTrainedConfig":
    """The config in a model directory. Runs no code from it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its config cannot be loaded ({str(error).splitlines()[0]})") from error


def load_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    device: "str | torch.device | None" = None,
    **config_overrides: object,
) -> "PreTrainedModel":
    """A causal language model in eval mode, from safetensors only, on `device` (default: the GPU if there is one).

    Args:
        dtype: one of DTYPES; "auto" keeps what the checkpoint stores.
        config_overrides: passed on to `from_pretrained`.

    Raises:
        CheckpointError: no such model, pickled weights only, weights missing, or code of its own.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    path = resolve_model(model, revision)
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a bar's redraws fill a log
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, trust_remote_code=False,
            device_map={"": device}, output_loading_info=True, **config_overrides,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a causal language model ({str(error).splitlines()[0]})") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(f"{path}: {len(names)} weights are not in the checkpoint, for instance {names[0]}")
    return loaded.eval()


def attach_adapter(
    model: "PreTrainedModel", adapter: str | Path, scale: float, *, any_base: bool = False, as_is: bool = False
) -> "PreTrainedModel":
    """The model that computes with base − scale·delta: a LoRA beside the weights, a dense task vector subtracted from them.

    Change the scale later with `set_scale`.

    Args:
        any_base: accept an adapter that was trained on another base.
        as_is: accept an adapter that is already negated (subtracting it puts the knowledge back).

    Raises:
        AdapterError: not an adapter, another base, a negated adapter, or keys that do not fit.
    """
    from peft import PeftModel

    from sku_vllm import adapter as files
    from sku_vllm.checkpoint import CheckpointReader

    loaded = files.load_adapter(adapter, as_is=as_is)
    loaded.check_base(CheckpointReader(model.name_or_path), any_base=any_base)
    if loaded.dense:
        return _subtract_dense(model, loaded, scale)
    try:
        edited = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise AdapterError(f"{adapter}: PEFT cannot attach it ({str(error).splitlines()[0]})") from error
    return set_scale(edited.eval(), scale)


def set_scale(model: "PreTrainedModel", scale: float) -> "PreTrainedModel":
    """Make a model from `attach_adapter` compute with base − scale·delta."""
    from peft.tuners.lora import LoraLayer

    if hasattr(model, "sku_dense_delta"):
        return _rescale_dense(model, scale)
    found = False
    for module in model.modules():
        if isinstance(module, LoraLayer):
            found = True
            for name in module.scaling:
                module.set_scale(name, -scale)
    if not found:
        raise AdapterError("this model has no adapter to scale; attach_adapter(model, adapter, scale) first")
    return model


def _subtract_dense(model: "PreTrainedModel", adapter: "LoraAdapter", scale: float) -> "PreTrainedModel":
    """Keeps the base's tensors, so that every scale starts from them: adding and subtracting in bf16 does not return."""
    own = dict(model.named_parameters())
    foreign = sorted(set(adapter.deltas) - set(own))
    if foreign:
        raise AdapterError(f"{adapter.path}: {len(foreign)} tensors the model does not have, for instance {foreign[0]}")
    model.sku_dense_delta = {name: delta.tensor() for name, delta in adapter.deltas.items()}
    model.sku_dense_base = {name: own[name].detach().clone() for name in adapter.deltas}
    return _rescale_dense(model, scale)


def _rescale_dense(model: "PreTrainedModel", scale: float) -> "PreTrainedModel":
    import torch

    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in model.sku_dense_delta.items():
            base = model.sku_dense_base[name]
            own[name].copy_(base.float() - scale * delta.to(base.device).float())
    return model
