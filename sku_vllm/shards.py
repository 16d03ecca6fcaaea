"""The output's shards, planned before anything is written: which bytes are the base's own and which are computed."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.placement import Placed
from sku_vllm.safetensors_file import DTYPES, Shard, TensorInfo

if TYPE_CHECKING:
    import torch

TORCH_TO_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The unit of writing and hashing, in bytes.
CHUNK = 8 << 20
CASTABLE = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output at `start`…`stop` of its file, made from `source` (of which it may be a renamed copy).

    `content`: its bytes (uint8), where they are known beforehand.
    """

    name: str
    source: TensorInfo
    dtype: str
    start: int
    stop: int
    edits: tuple[Placed, ...]
    content: "torch.Tensor | None" = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are the base's."""
        return not self.edits and self.dtype == self.source.dtype and self.content is None


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One output file: its header, its tensors in file order, its length in bytes, and the ranges where the base file has data."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    size: int


def plan_shards(
    reader: CheckpointReader,
    placed: Mapping[str, Sequence[Placed]],
    dtype: str = "keep",
    extra: Mapping[str, TensorInfo] | None = None,
    contents: Mapping[str, "torch.Tensor"] | None = None,
) -> list[OutputShard]:
    """One output shard per base shard, with the base's names and order.

    With dtype "keep" headers and offsets are the base's to the byte; otherwise every floating tensor is cast. `extra` tensors
    (an untied lm_head) go to the end of the last shard. `contents` replace the bytes of tensors whose dtype and shape stay.
    """
    shards = []
    for shard in reader.shards:
        added = dict(extra or {}) if shard is reader.shards[-1] else {}
        if dtype == "keep" and not added:
            tensors = [
                OutputTensor(i.name, i, i.dtype, i.offset, i.offset + i.nbytes, tuple(placed.get(i.name, ())), (contents or {}).get(i.name))
                for i in shard.tensors
            ]
            shards.append(OutputShard(shard.file.name, _header_of(shard), tuple(tensors), shard.size))
        else:
            shards.append(_new_layout(shard, placed, dtype, added, contents or {}))
    return shards


def _header_of(shard: Shard) -> bytes:
    with open(shard.file, "rb") as stream:
        return stream.read(shard.data_start)


def _new_layout(
    shard: Shard,
    placed: Mapping[str, Sequence[Placed]],
    dtype: str,
    added: Mapping[str, TensorInfo],
    contents: Mapping[str, "torch.Tensor"],
) -> OutputShard:
    entries: dict[str, object] = {"__metadata__": shard.metadata} if shard.metadata else {}
    rows, position = [], 0
    for name, info in [*((info.name, info) for info in shard.tensors), *added.items()]:
        cast = TORCH_TO_SAFETENSORS[dtype] if dtype != "keep" and info.dtype in CASTABLE else info.dtype
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


def data_ranges(descriptor: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data; the rest are holes that read as zeros and need no copying (sparse files)."""
    ranges, position = [], 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: only a hole is left
            break
        ranges.append((start, stop))
        position = stop
    return ranges


def fingerprint(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """(inode, length, modification time in ns) of every file, to notice one that changes while it is read."""
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]}
