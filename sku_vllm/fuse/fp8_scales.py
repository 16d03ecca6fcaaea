"""FP8 checkpoints: which tensor holds the scales of which weight, in what blocks, and what the scales of the edited weight are.

Open this file to support another layout of scales.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sku_vllm.adapter.placement import Placed
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fp8Scale:
    """Scales of one float8_e4m3fn weight [rows, cols]; weight = stored · scale.

    Attributes:
        tensor: name of the checkpoint tensor that holds them. old: float32 [scale rows, scale columns].
        new: scales of the edited weight; None keeps `old`. stored: `new` in the dtype and shape in which the checkpoint stores scales.
    """

    tensor: str
    old: "torch.Tensor"
    new: "torch.Tensor | None" = None
    stored: "torch.Tensor | None" = None


def scale_of_fp8(reader: CheckpointReader, name: str) -> Fp8Scale:
    """The scales that a checkpoint stores for one FP8 weight.

    `NAME_scale_inv` (DeepSeek's blocks of 128x128; despite the name it multiplies) or `NAME_scale` (per tensor or per row).
    Raises CheckpointError when the weight has no scales, or ones of an unknown shape.
    """
    info = reader.info(name)
    found = next((name + ending for ending in ("_scale_inv", "_scale") if name + ending in reader), None)
    if found is None or info.dtype != "F8_E4M3" or len(info.shape) != 2:
        raise CheckpointError(f"{info.file}: {name!r} is {info.dtype} without a scale this package knows; fuse into the unquantised model")
    scale = reader.tensor(found).float()
    if scale.numel() == 1:
        return Fp8Scale(found, scale.reshape(1, 1))
    if tuple(scale.shape) in (info.shape[:1], (info.shape[0], 1)):
        return Fp8Scale(found, scale.reshape(-1, 1))
    block = (reader.config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
    if scale.ndim == 2 and all(-(-size // step) == count for size, step, count in zip(info.shape, block, scale.shape, strict=True)):
        from sku_vllm.kernels.delta_merge import merge_blocks

        # `merge_blocks` allows a last block shorter than the others only for blocks of 128
        if all(count == 1 or cut == step for count, cut, step in zip(scale.shape, merge_blocks(info.shape, scale), block, strict=True)):
            return Fp8Scale(found, scale)
    raise CheckpointError(
        f"{info.file}: {found!r} is {list(scale.shape)}, which fits no known layout of scales; fuse into the unquantised model"
    )


def find_scales(reader: CheckpointReader, placed: Mapping[str, Sequence[Placed]], choice: str) -> dict[str, Fp8Scale]:
    """Scales of every edited FP8 weight by its name; with "recompute" also those of the result, from a pass over the weights.

    Raises:
        ConfigError: "recompute" without an edited FP8 weight. CheckpointError: scales of an unknown layout.
    """
    scales = {name: scale_of_fp8(reader, name) for name in placed if name in reader and reader.info(name).dtype.startswith("F8")}
    if choice == "keep":
        return scales
    if not scales:
        raise ConfigError(f"--fp8-scales recompute: no edited tensor of {reader.path} is FP8; leave the flag out")
    return _recomputed(reader, placed, scales)


def _recomputed(reader: CheckpointReader, placed: Mapping[str, Sequence[Placed]], scales: Mapping[str, Fp8Scale]) -> dict[str, Fp8Scale]:
    import os

    from sku_vllm.adapter.placement import terms_of
    from sku_vllm.kernels.delta_merge import recomputed_scale
    from sku_vllm.kernels.delta_merge.cpu import one_torch_thread

    powers_of_two = (reader.config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"

    def run(name: str) -> Fp8Scale:
        scale, rows = scales[name], reader.info(name).shape[0]
        terms = [term for edit in placed[name] for term in terms_of(edit, 0, rows)]
        return _stored(reader, scale, recomputed_scale(reader.mapped(name), terms, scale.old), powers_of_two)

    with one_torch_thread(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(scales, pool.map(run, scales), strict=True))


def _stored(reader: CheckpointReader, scale: Fp8Scale, new: "torch.Tensor", powers_of_two: bool) -> Fp8Scale:
    """`scale` with `new` converted to its tensor's dtype, or to powers of two; rounded up, since a smaller scale would clip weights."""
    import torch

    info = reader.info(scale.tensor)
    dtype = reader.tensor(scale.tensor).dtype
    if powers_of_two or dtype == torch.float8_e8m0fnu:
        fraction, exponent = torch.frexp(new)
        new = torch.ldexp(torch.ones_like(new), exponent - (fraction == 0.5).int())
    stored = new.to(dtype).contiguous()
    bits = stored.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    bits += (stored.float() < new).to(bits.dtype)
    return Fp8Scale(scale.tensor, scale.old, stored.float(), stored.reshape(info.shape))


def contents_of(scales: Iterable[Fp8Scale]) -> dict[str, "torch.Tensor"]:
    """The recomputed scale tensors, as bytes by name."""
    import torch

    return {scale.tensor: scale.stored.reshape(-1).view(torch.uint8) for scale in scales if scale.stored is not None}
