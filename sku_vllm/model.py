"""Load the model that a ModelSpec describes into transformers, from safetensors only, and subtract its adapter: base − scale·delta.

Open this file to change how weights, tokenizers and adapters are loaded, or how the scale of an attached adapter is changed.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sku_vllm.checkpoint.files import why_no_weights, without_adapter
from sku_vllm.checkpoint.reader import CheckpointReader, checkpoint_directory
from sku_vllm.compute_dtype import computed_in
from sku_vllm.errors import AdapterError, CheckpointError
from sku_vllm.model_spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Share of a GPU's free memory that weights may take before they are spread over several; caches and activations need the rest.
GPU_FOR_WEIGHTS = 0.7


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: `model` itself if it is a directory, else a snapshot of that hub id without its pickled files.

    Raises:
        CheckpointError: no such directory, no config.json, or only pickled weights (the message says how to convert them).
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
    """The tokenizer of a model directory or hub id. Runs no code from the repository.

    Raises:
        CheckpointError: no such model, or a tokenizer that transformers cannot load.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model, revision)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def context_length(config: "PreTrainedConfig") -> int | None:
    """The most tokens a model accepts (max_position_embeddings), or None if its config does not say, or says −1 (XLNet)."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if most is None or most < 0 else most


def load_config(path: Path) -> "PreTrainedConfig":
    """The config in a model directory. Runs no code from it.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoConfig

    try:
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its config cannot be loaded ({str(error).splitlines()[0]})") from error


def load_model(model: ModelSpec | str | Path, *, device: "str | torch.device | None" = None, **config_overrides: Any) -> "PreTrainedModel":
    """The causal language model a spec describes, in eval mode, from safetensors only; a path or hub id means that model, unedited.

    With an adapter the model computes base − scale·delta: see `attach_adapter`. `edited_model` returns plain, already edited weights.

    Args:
        device: default: the GPU if there is one.
        config_overrides: passed on to `from_pretrained`.

    Raises:
        CheckpointError: no such model, pickled weights only, missing weights, or an architecture that needs the repository's own code.
        AdapterError: see `attach_adapter`.
    """
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
    loaded = _load_weights(spec, device, config_overrides)
    if spec.adapter is None:
        return loaded
    return attach_adapter(loaded, spec.adapter, spec.strength, any_base=spec.any_base, as_is=spec.as_is)


def settle_dtype(spec: ModelSpec, *, device: "str | torch.device | None" = None) -> ModelSpec:
    """The spec with `computed_in`: what its dtype comes to on this machine, unless that is settled already. Reads headers only.

    device: where the model will be; default: the GPU if there is one.
    """
    import torch

    if spec.computed_in is not None:
        return spec
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    reader = CheckpointReader(resolve_model(spec.model, spec.revision))
    return replace(spec, computed_in=computed_in(spec.dtype, reader.stored_dtype, kind, reader.size))


def _placement(path: Path, device: "str | torch.device | None") -> Any:
    """A `device_map`: the device asked for; else the first GPU, all of them where the weights do not fit into it, or the CPU."""
    import torch

    if device is not None or not torch.cuda.is_available():
        return {"": device or "cpu"}
    free, _ = torch.cuda.mem_get_info(0)
    spread = torch.cuda.device_count() > 1 and CheckpointReader(path).size > GPU_FOR_WEIGHTS * free
    return "auto" if spread else {"": "cuda"}


def _load_weights(spec: ModelSpec, device: "str | torch.device | None", config_overrides: Mapping[str, Any]) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = resolve_model(spec.model, spec.revision)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar's redraws fill a log
    # A quantised load computes in the dtype that its own configuration names.
    dtype = spec.dtype if "quantization_config" in config_overrides else settle_dtype(spec, device=device).computed_in or "auto"
    try:
        with without_adapter(path) as place:
            loaded, info = cast(
                "tuple[PreTrainedModel, dict[str, Any]]",
                AutoModelForCausalLM.from_pretrained(
                    place,
                    dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                    use_safetensors=True,
                    trust_remote_code=False,
                    device_map=_placement(path, device),
                    output_loading_info=True,
                    **config_overrides,
                ),
            )
        loaded.name_or_path = loaded.config._name_or_path = str(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a causal language model ({str(error).splitlines()[0]})") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(f"{path}: {len(names)} weights are not in the checkpoint, for instance {names[0]}")
    loaded.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return loaded


def attach_adapter(
    model: "PreTrainedModel", adapter: str | Path, scale: float, *, any_base: bool = False, as_is: bool = False
) -> "PreTrainedModel":
    """Make a model compute base − scale·delta. A LoRA runs beside the unchanged weights; a dense task vector changes them in place.

    Change the scale later with `set_scale`. With a LoRA the result is PEFT's wrapper, which forwards every attribute to the model.

    Args:
        any_base: accept an adapter that was trained on another base.
        as_is: accept an adapter that is already negated (subtracting it puts the knowledge back).

    Raises:
        AdapterError: not an adapter, another base, a negated adapter, or keys that do not fit.
    """
    from peft import PeftModel

    from sku_vllm.adapter import adapter as files
    from sku_vllm.adapter.attachment import check_attachable, fill_missing, own_weights_kept
    from sku_vllm.adapter.dense_edit import DenseEdit

    loaded = files.load_adapter(adapter, as_is=as_is)
    reader = CheckpointReader(str(model.name_or_path))
    loaded.check_base(reader, any_base=any_base)
    if loaded.dense:
        vars(model)["sku_dense_edit"] = DenseEdit(model, loaded)
        return set_scale(model, scale)
    check_attachable(loaded, reader)
    try:
        with warnings.catch_warnings(record=True) as said, own_weights_kept(model, loaded):
            warnings.simplefilter("always")
            edited = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise AdapterError(f"{adapter}: PEFT cannot attach it ({str(error).splitlines()[0]})") from error
    fill_missing(edited, loaded, reader, [str(warning.message) for warning in said])
    return set_scale(cast("PreTrainedModel", edited.eval()), scale)


def set_scale(model: "PreTrainedModel", scale: float) -> "PreTrainedModel":
    """Make a model with an attached adapter compute with base − scale·delta.

    Raises:
        AdapterError: it has no adapter.
    """
    from peft.tuners.lora import LoraLayer

    if (dense := vars(model).get("sku_dense_edit")) is not None:
        dense.apply(scale)
        return model
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterError("this model has no adapter to scale; attach_adapter(model, adapter, scale) first")
    for layer in layers:
        for name in layer.scaling:
            layer.set_scale(name, -scale)
    return model


def edited_model(spec: ModelSpec) -> "PreTrainedModel":
    """The model of a spec as plain weights, its adapter (a LoRA or a dense task vector) subtracted; raises as `load_model` does."""
    loaded = load_model(spec)
    # Only PEFT's wrapper of a LoRA has to be merged; otherwise the weights are plain already.
    return cast("Any", loaded).merge_and_unload() if hasattr(loaded, "merge_and_unload") else loaded
