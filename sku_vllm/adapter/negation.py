"""Write a negated adapter: PEFT and vLLM can only add adapters, and adding this one subtracts the original.

Open this file to change what `sku negate` writes, and `sku serve` for its `lora:` arms.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.adapter.adapter import RUN, LoraAdapter, load_adapter
from sku_vllm.adapter.adapter_keys import factor_key
from sku_vllm.adapter.weight_names import Layout
from sku_vllm.checkpoint.reader import CheckpointReader, checkpoint_directory
from sku_vllm.errors import AdapterError, ConfigError
from sku_vllm.output import json_text, output_directory, record, write_text

if TYPE_CHECKING:
    import torch


def negate_adapter(
    path: str | Path,
    scale: float,
    output: str | Path,
    *,
    as_is: bool = False,
    model: str | Path | None = None,
    served_by: CheckpointReader | None = None,
) -> dict[str, Any]:
    """Write an adapter that makes base − scale·delta of the base when it is added: every B is multiplied by −scale.

    Nothing else changes, so alpha_pattern, rank_pattern and rsLoRA keep their meaning. A B whose product its dtype cannot
    hold exactly is stored in float32. PEFT and vLLM load the result as it is.

    Args:
        path: a raw adapter's directory. scale: strength of the negation, ≥ 0. output: directory to write (mode 0700); absent or empty.
        as_is: accept an adapter that is already negated, and negate it again.
        model: the base, with which whole tensors that the adapter carries along are compared; default: the one it names, if it is here.
        served_by: the base that vLLM serves, see `write_negation`.
    Returns:
        What `sku negate --json` prints.
    Raises:
        AdapterError: not an adapter, a negated one without `as_is`, or one that carries retrained tensors, which have no negation.
        ConfigError: a scale that is negative or not finite, or an output that exists.
    """
    if not math.isfinite(scale) or scale < 0:
        raise ConfigError(f"--scale {scale}: must be a number ≥ 0; 1 subtracts exactly what was trained")
    adapter = load_adapter(path, as_is=as_is)
    check_carried(adapter, model)
    with output_directory(output, mode=0o700) as partial:
        tensors = write_negation(adapter, scale, partial, served_by)
        write_text(partial / "README.md", _card(adapter, scale))
        result = {"adapter": str(path), "scale": scale, "source_digest": adapter.digest, "tensors": tensors, "output": str(output)}
        record(partial, "negate", result, {"adapter": str(path), "scale": scale, "as_is": as_is, "output": str(output)})
    return result


def check_carried(adapter: LoraAdapter, model: str | Path | None = None) -> None:
    """Make sure that the whole tensors an adapter carries along are its base's own: they are left out of the negation.

    Args:
        model: the base; default: the one that the adapter names, if it is a directory here.

    Raises:
        AdapterError: they are not, or there is no base to compare them with.
    """
    if not adapter.copies:
        return
    named = [adapter.config.get("base_model_name_or_path"), adapter.run.get("base")]
    base = model or next((name for name in named if name and Path(str(name)).is_dir()), None)
    if base is None:
        raise AdapterError(
            f"{adapter.path}: carries whole tensors ({', '.join(sorted(adapter.copies))}), which have no negation unless they are the "
            "base's own; give the base as --model to compare them with it"
        )
    retrained = Layout(CheckpointReader(checkpoint_directory(base))).check_copies(adapter)
    if retrained:
        raise AdapterError(f"{adapter.path}: {'; '.join(retrained)}, so base + negated would not be base − adapter; train without them")


def write_negation(adapter: LoraAdapter, scale: float, directory: Path, served_by: CheckpointReader | None = None) -> int:
    """Write the files of a negated adapter that PEFT and vLLM read, unsynced (`output_directory` syncs them), without what it carries
    along (`check_carried`), and under the keys that PEFT gives its factors.

    Args:
        served_by: the base that vLLM serves: factors get the names of the class in its config.json, also where the adapter has those of
            another class or release. vLLM leaves modules unedited, without a word, whose names it does not find.

    Returns:
        How many tensors they hold.

    Raises:
        AdapterError: float32 cannot hold the scaled factors.
    """
    from safetensors.torch import save_file

    reader = CheckpointReader(adapter.file)
    layout = None if served_by is None else Layout(served_by)
    tensors = {}
    for key in reader.names:
        factor = factor_key(key)
        if adapter.dense:
            tensors[key] = _times(reader.mapped(key), -scale)
        elif factor:
            factor = factor if layout is None else factor._replace(module=layout.declared_module(factor.module))
            tensors[factor.key] = _times(reader.mapped(key), -scale) if factor.side == "B" else reader.mapped(key)
    run = {**adapter.run, "schema": "sku.run/1", "negated": {"scale": scale, "source_digest": adapter.digest}}
    run.setdefault("adapter_kind", "dense" if adapter.dense else "lora")
    save_file(tensors, directory / adapter.file.name, metadata={"format": "pt"})
    if not adapter.dense:
        (directory / "adapter_config.json").write_text(json_text({**adapter.config, "inference_mode": True}), encoding="utf-8")
    (directory / RUN).write_text(json_text(run), encoding="utf-8")
    return len(tensors)


def _times(tensor: "torch.Tensor", factor: float) -> "torch.Tensor":
    product = tensor.double() * factor
    narrow = product.to(tensor.dtype)
    if not bool(product.float().isfinite().all()):
        raise AdapterError(f"scale {-factor:g} makes factors that float32 cannot hold; use a smaller --scale")
    return narrow.contiguous() if bool((narrow.double() == product).all()) else product.float().contiguous()


def _card(adapter: LoraAdapter, scale: float) -> str:
    base = adapter.config.get("base_model_name_or_path") or adapter.run.get("base") or "unknown"
    return (
        f"---\nbase_model: {base}\n---\n\n# Negated task vector, scale {scale:g}\n\n"
        "Adding this adapter to its base, with PEFT or vLLM, subtracts the harmful knowledge that was identified there. Its mirror image\n"
        "*is* that knowledge: whoever flips its sign has the harmful adapter back. Do not publish it. `sku fuse`, `sku eval`,\n"
        "`sku negate` and `sku serve` refuse it: they take the raw adapter it was made from, and negate that themselves.\n"
    )
