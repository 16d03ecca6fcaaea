"""Read one safetensors file: parse its header, check it against the file's length, and read bytes.

Open this file when a checkpoint is refused as broken, or a dtype is not known.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.errors import CheckpointError

# The unit of writing and hashing, in bytes.
CHUNK = 8 << 20
# safetensors spelling: (torch attribute, bits per element)
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts bytes from the start of `file`; `dtype` is safetensors' spelling ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors in file order, its metadata, and where the data begins."""

    file: Path
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int
    size: int


def read_shard(file: Path) -> Shard:
    """Parse one header and check it against the file's length. Raises CheckpointError naming the file and what is wrong."""

    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: {why}; download or save the file again")

    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(8)
            if first == b"version ":
                raise CheckpointError(f"{file}: is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
            length = int.from_bytes(first, "little")
            if size < 8 or length > size - 8:
                raise broken("not a complete safetensors file (its header is cut off)")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise broken("its safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise broken("its safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    tensors = []
    try:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not isinstance(entry["dtype"], str) or not all(type(number) is int for number in (begin, end, *entry["shape"])):
                raise TypeError("a dtype that is no string, or an offset or size that is no integer")
            tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin))
    except (KeyError, TypeError, ValueError) as error:
        raise broken(f"tensor {name!r} has a malformed header entry") from error
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    position = start
    for info in tensors:
        bits = DTYPES.get(info.dtype, (None, None))[1]
        if info.offset != position or info.nbytes < 0:
            raise broken(f"tensor {info.name!r} overlaps another one or leaves a gap")
        if bits is not None and info.nbytes != math.prod(info.shape) * bits // 8:
            raise broken(f"tensor {info.name!r} has {info.nbytes} bytes, but {info.dtype} {list(info.shape)} needs another number")
        position += info.nbytes
    if position != size:
        raise broken(f"is {size} bytes long, but its tensors end at byte {position}")
    return Shard(file, tuple(tensors), metadata, start, size)


def read_into(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from `offset` on. Raises CheckpointError when the file ends early."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ended at byte {offset + done}; it changed while it was read, start again")
        done += count


def data_ranges(descriptor: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of every range of a sparse file that has data; the rest are holes, which read as zeros and need no copying."""
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
