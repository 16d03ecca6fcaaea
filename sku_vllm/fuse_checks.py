"""What `sku fuse` refuses before it writes anything."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sku_vllm.adapter import LoraAdapter
from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.errors import CheckpointError, ConfigError
from sku_vllm.kernels.delta_merge.backend import Backend, choose_backend
from sku_vllm.placement import Scale
from sku_vllm.safetensors_file import TensorInfo

DTYPE_CHOICES = ("keep", "float32", "bfloat16", "float16")
FP8_METHODS = ("fp8", "fbgemm_fp8", "modelopt")


def check_flags(adapters: Sequence[tuple[str | Path, Scale]], dtype: str) -> None:
    """Raises ConfigError for values that mean nothing."""
    if dtype not in DTYPE_CHOICES:
        raise ConfigError(f"--dtype {dtype}: unknown; choose from {', '.join(DTYPE_CHOICES)}")
    if not adapters:
        raise ConfigError("--adapter: give at least one adapter directory")
    for path, scale in adapters:
        for value in scale.values() if isinstance(scale, Mapping) else [scale]:
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"--adapter {path}: scale {value} must be a number ≥ 0; 1 subtracts exactly what was trained")


def check_device(device: str) -> Backend:
    """Where `--device` says to merge. Raises ConfigError where it says nothing known, or there is no such device."""
    try:
        return choose_backend(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_unquantised(reader: CheckpointReader, dtype: str, adapters: Sequence[LoraAdapter] = ()) -> None:
    """Refuse bases whose stored numbers are codes of the weights; FP8 ones are numbers and stay in their format. Raises CheckpointError."""
    settings = reader.config.get("quantization_config") or {}
    method, code = settings.get("quant_method"), _first_code(reader)
    if method is None and code is None:
        return
    if code is not None:
        method = f"{code.name} is {code.dtype}"
    elif method in FP8_METHODS or (method == "compressed-tensors" and settings.get("format") in ("float-quantized", "naive-quantized")):
        if dtype != "keep":
            raise CheckpointError(f"{reader.path}: is quantised to FP8, which --dtype {dtype} would mix with its scales; use --dtype keep")
        return
    bases = sorted({str(adapter.run["base"]) for adapter in adapters if trained_on(adapter) and adapter.run.get("base")})
    which = f" ({', '.join(bases)}: an adapter trained with --quantize belongs to the unquantised base)" if bases else ""
    raise CheckpointError(
        f"{reader.path}: is quantised ({method}), so an edit cannot be added to its weights; "
        f"fuse into the unquantised model it was made from{which} and quantise the result again"
    )


def _first_code(reader: CheckpointReader) -> TensorInfo | None:
    """A weight that holds codes: old GPTQ, AWQ and bitsandbytes checkpoints do not say in their config that they are quantised."""
    for info in map(reader.info, reader.names):
        if info.name.endswith(".qweight") or (info.name.endswith(".weight") and info.dtype in ("I8", "U8", "I32")):
            return info
    return None


def trained_on(adapter: LoraAdapter) -> str | None:
    """How the base was quantised while this adapter was trained ("4bit"), or None."""
    config = adapter.run.get("config")
    return config.get("quantize") if isinstance(config, dict) else None
