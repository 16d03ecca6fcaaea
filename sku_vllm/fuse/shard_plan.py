"""Plan a fusion before anything is written: the scales of FP8 weights, and which bytes are copied from the base and which are computed.

Open this file to change what is decided before the first byte is written, or the layout of a fused checkpoint's files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sku_vllm.adapter.placement import Placed
from sku_vllm.adapter.tied_weights import Ties
from sku_vllm.adapter.transformers_names import names_of
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.checkpoint.safetensors_file import DTYPES, Shard, TensorInfo
from sku_vllm.errors import ConfigError
from sku_vllm.fuse.fp8_scales import Fp8Scale, contents_of, find_scales
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.fuse.output_dtypes import output_dtypes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output at `start`…`stop` of its file, made from `source` (of which it may be a renamed copy).

    `content`: its bytes (uint8), if they are known beforehand (recomputed FP8 scales). `copied`: whether its bytes are the base's.
    """

    name: str
    source: TensorInfo
    dtype: str
    start: int
    stop: int
    edits: tuple[Placed, ...]
    content: "torch.Tensor | None" = None
    copied: bool = field(init=False)

    def __post_init__(self) -> None:
        as_stored = not self.edits and self.dtype == self.source.dtype and self.content is None
        object.__setattr__(self, "copied", as_stored or self.start == self.stop)


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One output file: its header, its tensors in file order, and its length in bytes."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    size: int


@dataclass(frozen=True, slots=True)
class FusePlan:
    """Everything that is decided before the first byte is written.

    scales: of every edited FP8 weight, by its name. shards: the files to write, in the order of the base's.
    size: bytes of all shards. index: content of `model.safetensors.index.json`; None where the base has none, or its own holds as it is.
    """

    scales: Mapping[str, Fp8Scale]
    shards: Sequence[OutputShard]
    size: int
    index: Mapping[str, Any] | None


def plan_fusion(request: FuseRequest, reader: CheckpointReader, placed: Mapping[str, Sequence[Placed]]) -> FusePlan:
    """Decide every byte's origin, and recompute FP8 scales where the request asks for it (a pass over the edited weights).

    There is one output shard per base shard, with the base's names and order. With dtype "keep" headers and offsets are the base's to
    the byte; otherwise every floating tensor is cast that `output_dtypes` says. An untied output head goes to the end of the last shard.

    Raises:
        ConfigError: `untie` without tied embeddings, or `fp8_scales="recompute"` without FP8 weights among the edited ones.
        CheckpointError: FP8 weights whose scales have an unknown layout.
    """
    scales = find_scales(reader, placed, request.fp8_scales)
    contents = contents_of(scales.values())
    shards, dtypes = [], output_dtypes(reader, request.dtype)
    for shard in reader.shards:
        added = _untied(reader) if request.untie and shard is reader.shards[-1] else {}
        if request.dtype == "keep" and not added:
            tensors = [
                OutputTensor(i.name, i, i.dtype, i.offset, i.offset + i.nbytes, tuple(placed.get(i.name, ())), contents.get(i.name))
                for i in shard.tensors
            ]
            shards.append(OutputShard(shard.file.name, _header_of(shard), tuple(tensors), shard.size))
        else:
            shards.append(_new_layout(shard, placed, dtypes, added, contents))
    return FusePlan(scales, shards, sum(shard.size for shard in shards), _new_index(reader, shards))


def _untied(reader: CheckpointReader) -> dict[str, TensorInfo]:
    """The tied parameters as tensors of their own, each taking its values from the one it was tied to."""
    ties = Ties(reader, names_of(reader))
    if not ties.shared:
        raise ConfigError(f"--untie: the embeddings of {reader.path} are not tied; leave the flag out")
    return {parameter: reader.info(source) for parameter, source in ties.written_alone().items()}


def _new_index(reader: CheckpointReader, shards: Sequence[OutputShard]) -> dict[str, Any] | None:
    tensors = [(tensor, shard.file) for shard in shards for tensor in shard.tensors]
    if reader.index is None or all(tensor.dtype == tensor.source.dtype and tensor.name in reader for tensor, _ in tensors):
        return None
    size = sum(tensor.stop - tensor.start for tensor, _ in tensors)
    weight_map = dict(sorted((tensor.name, file) for tensor, file in tensors))
    return {"metadata": {**reader.index["metadata"], "total_size": size}, "weight_map": weight_map}


def _header_of(shard: Shard) -> bytes:
    with open(shard.file, "rb") as stream:
        return stream.read(shard.data_start)


def _new_layout(
    shard: Shard,
    placed: Mapping[str, Sequence[Placed]],
    dtypes: Mapping[str, str],
    added: Mapping[str, TensorInfo],
    contents: Mapping[str, "torch.Tensor"],
) -> OutputShard:
    entries: dict[str, object] = {"__metadata__": shard.metadata} if shard.metadata else {}
    rows, position = [], 0
    for name, info in [*((info.name, info) for info in shard.tensors), *added.items()]:
        cast = dtypes[info.name]
        nbytes = info.nbytes * DTYPES[cast][1] // DTYPES[info.dtype][1] if cast != info.dtype else info.nbytes
        entries[name] = {"dtype": cast, "shape": list(info.shape), "data_offsets": [position, position + nbytes]}
        rows.append((name, info, cast, position, position + nbytes))
        position += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    base = len(header)
    tensors = [
        OutputTensor(n, info, cast, base + start, base + stop, tuple(placed.get(n, ())), contents.get(n))
        for n, info, cast, start, stop in rows
    ]
    return OutputShard(shard.file.name, header, tuple(tensors), base + position)
