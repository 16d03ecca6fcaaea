"""What `sku fuse` refuses: a device that is not there, a quantised base, a disk that is too small, sums that a dtype cannot hold.

Open this file to refuse another base, or to change what such an error says; a request's own values are checked in `fuse_request.py`.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.adapter.quantised_weights import codes_in, remedy
from sku_vllm.adapter.transformers_names import names_of
from sku_vllm.checkpoint.files import INDEX
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import CheckpointError, ConfigError, RunError
from sku_vllm.fuse.shard_writer import Written
from sku_vllm.kernels.delta_merge.merge_backend import MergeBackend, choose_backend

NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
FP8_METHODS = ("fp8", "fbgemm_fp8", "modelopt")


def check_device(device: str) -> MergeBackend:
    """The merge backend that `--device` names.

    Raises:
        ConfigError: an unknown name, or "cuda" without a usable GPU.
    """
    try:
        return choose_backend(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_unquantised(reader: CheckpointReader, dtype: str, adapters: Sequence[LoraAdapter] = ()) -> None:
    """Refuse a base whose weights are a quantiser's codes (bitsandbytes), or one that `dtype` would cast beside its codes.

    Where other weights are stored as they are, as the attention of MXFP4 checkpoints, `place` refuses edits of the coded ones. FP8 weights
    are numbers: they are edited, and stay FP8, if `dtype` is "keep".

    Raises:
        CheckpointError: naming the quantiser, and the unquantised base that the adapters were trained on.
    """
    settings = reader.config.get("quantization_config") or {}
    method, codes = settings.get("quant_method"), codes_in(reader)
    if method is None and not codes:
        return
    if method in FP8_METHODS or (method == "compressed-tensors" and settings.get("format") in ("float-quantized", "naive-quantized")):
        if dtype != "keep":
            raise CheckpointError(f"{reader.path}: is quantised to FP8, which --dtype {dtype} would mix with its scales; use --dtype keep")
        return
    if codes and dtype == "keep":
        return
    if codes:
        code = next(iter(codes.values()))
        raise CheckpointError(
            f"{reader.path}: {code.name} holds a quantiser's codes, whose scales --dtype {dtype} would cast; use --dtype keep"
        )
    bases = sorted({str(adapter.run["base"]) for adapter in adapters if adapter.quantised_base and adapter.run.get("base")})
    raise CheckpointError(f"{reader.path}: is quantised ({method}), so an edit cannot be added to its weights; {remedy(reader, bases)}")


def check_complete(reader: CheckpointReader) -> None:
    """Refuse an index that lists fewer shards than their names count, if parameters of the model are in none of them.

    transformers fills those with random numbers, in the base as in what would be fused from it.

    Raises:
        CheckpointError: naming one of the parameters, or the number of shards where transformers does not know the architecture.
    """
    numbers = [match for shard in reader.shards if (match := NUMBERED.search(shard.file.name))]
    total = max((int(match[2]) for match in numbers), default=0)
    if reader.index is None or len({match[1] for match in numbers}) >= total:
        return
    names = names_of(reader)
    lacking = [] if names is None else [name for name in names.parameters if name not in names.sources and name not in names.tied]
    if names is None or lacking:
        example = f", and {lacking[0]} is in none of them" if lacking else ""
        raise CheckpointError(
            f"{reader.path / INDEX}: lists {len(reader.shards)} of {total} shards{example}; download the index and all shards again"
        )


def check_space(reader: CheckpointReader, planned: int, output: Path) -> None:
    """Refuse a disk without room for an output of `planned` bytes, or less if the base is a sparse file: its holes stay holes.

    Raises:
        RunError: naming the bytes needed and free.
    """
    base = sum(shard.size for shard in reader.shards)
    occupied = sum(min(os.stat(shard.file).st_blocks * 512, shard.size) for shard in reader.shards)
    needed = int(occupied * planned / max(base, 1))
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RunError(f"{output}: needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free; nothing was written there")


def check_overflow(written: Written) -> None:
    """Raises RunError naming the first tensor with merged weights that its dtype cannot hold."""
    for name, parts in written.merged.items():
        count = written.totals(parts).overflowed
        if count:
            raise RunError(
                f"{name}: {count} merged weights are NaN or too large for their dtype; "
                "look for NaN in a dense adapter, else use a smaller --scale, or --dtype float32"
            )
