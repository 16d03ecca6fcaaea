"""FP8 checkpoints: which tensor holds the scales of which weight, and in what blocks."""

from typing import TYPE_CHECKING

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def scale_of_fp8(reader: CheckpointReader, name: str) -> "torch.Tensor":
    """The scales of one float8_e4m3fn weight [rows, cols], float32 [scale rows, scale columns]; weight = stored · scale.

    `NAME_scale_inv` (DeepSeek's blocks of 128x128; despite the name it multiplies) or `NAME_scale` (per tensor or per row).
    Raises CheckpointError when there is none or its shape is unknown.
    """
    info = reader.info(name)
    found = next((name + ending for ending in ("_scale_inv", "_scale") if name + ending in reader), None)
    if found is None or info.dtype != "F8_E4M3" or len(info.shape) != 2:
        raise CheckpointError(f"{info.file}: {name!r} is {info.dtype} without a scale this package knows; fuse into the unquantised model")
    scale = reader.tensor(found).float()
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == info.shape[0] and scale.ndim <= 2:
        return scale.reshape(-1, 1)
    block = (reader.config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
    if scale.ndim == 2 and all(-(-size // step) == count for size, step, count in zip(info.shape, block, scale.shape, strict=True)):
        return scale
    raise CheckpointError(
        f"{info.file}: {found!r} is {list(scale.shape)}, which fits no known layout of scales; fuse into the unquantised model"
    )
