"""Safetensors checkpoints, read lazily: the headers say where every tensor lies, and only asked-for bytes are read.

Neither torch nor transformers is imported until a tensor is asked for, so identities and errors are quick.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
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
# Identity: 16 windows of 4 KiB spread evenly over a tensor, both ends included; a tensor of at most 64 KiB is read whole.
WINDOWS, WINDOW = 16, 4096


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
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise broken("not a complete safetensors file (its header is cut off)")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; check the path and its permissions") from error
    except ValueError as error:
        raise broken("its safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise broken("its safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    tensors = []
    try:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
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


class CheckpointReader:
    """A model directory (single file, or sharded with an index) or one .safetensors file.

    Attributes:
        path: what was opened. shards: one `Shard` per file, in name order. index: the parsed index file, or None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        self.shards = tuple(read_shard(file) for file in self._find_files())
        self._infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, Any] = {}
        for shard in self.shards:
            for info in shard.tensors:
                if info.name in self._infos:
                    other = self._infos[info.name].file.name
                    raise CheckpointError(f"{shard.file}: tensor {info.name!r} is also in {other}; remove one copy")
                self._infos[info.name] = info
        if self.index is not None:
            missing = [name for name in self.index["weight_map"] if name not in self._infos]
            if missing:
                where = f"{self.path / INDEX}: lists {len(missing)} tensors that no shard holds"
                raise CheckpointError(f"{where} ({missing[0]}, …); download it again")

    def _find_files(self) -> list[Path]:
        path = self.path
        if path.is_file():
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path}: not a .safetensors file; give a model directory")
            return [path]
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such model directory; check the path, or download the model first")
        if (path / "model.safetensors").is_file():
            return [path / "model.safetensors"]
        if (path / INDEX).is_file():
            return self._indexed_files()
        files = sorted(path.glob("*.safetensors"))
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path}: is an adapter, not a model; give it as --adapter and its base as --model")
        if len(files) == 1:
            return files
        if files:
            raise CheckpointError(f"{path}: {len(files)} safetensors files but no {INDEX}; save the model again with save_pretrained")
        raise CheckpointError(f"{path}: {self._why_no_files()}")

    def _why_no_files(self) -> str:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in self.path.glob(pattern))
        pickles = [name for name in pickles if name != "training_args.bin"]
        if not pickles:
            return "no safetensors weights in this directory; give a directory written by save_pretrained"
        return (
            f"holds pickled weights only ({pickles[0]}), and unpickling runs any code in them; if you trust their source, convert them: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{self.path}').save_pretrained('{self.path}-safetensors')\" and copy the tokenizer files beside them"
        )

    def _indexed_files(self) -> list[Path]:
        try:
            self.index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(self.index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path / INDEX}: not a safetensors index (no valid weight_map); download it again") from error
        files = [self.path / name for name in names]
        if not files:
            raise CheckpointError(f"{self.path / INDEX}: its weight_map is empty; download it again")
        for file in files:
            if file.parent != self.path or not file.is_file():
                raise CheckpointError(f"{file}: named in {INDEX} but not there; download the missing shard")
        return files

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in shard and file order."""
        return tuple(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def info(self, name: str) -> TensorInfo:
        """dtype, shape, file, offset and nbytes of one tensor. Raises CheckpointError when there is none of that name."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}; check that model and adapter belong together") from None

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor, read now into memory of its own."""
        import torch

        info = self.info(name)
        dtype = DTYPES.get(info.dtype, (None, 0))[0]
        if dtype is None or not hasattr(torch, dtype):
            raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}, which torch cannot hold; use an unquantised model")
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        if info.nbytes:
            with open(info.file, "rb", buffering=0) as stream:
                read_into(stream.fileno(), memoryview(raw.numpy()), info.offset, info.file)
        return raw.view(getattr(torch, dtype)).reshape(info.shape)

    def mapped(self, name: str) -> "torch.Tensor":
        """One tensor as a read-only view of the file: pages come in when touched and are no memory of ours."""
        import mmap

        import torch

        info = self.info(name)
        dtype = getattr(torch, DTYPES.get(info.dtype, ("",))[0], None)
        if dtype is None or not info.nbytes or info.offset % dtype.itemsize:
            return self.tensor(name)
        if info.file not in self._maps:
            with open(info.file, "rb") as stream:  # private and writable, or torch warns; nobody writes
                self._maps[info.file] = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(self._maps[info.file], dtype=dtype, count=info.nbytes // dtype.itemsize, offset=info.offset).reshape(
            info.shape
        )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json beside the weights; empty when there is none."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not valid JSON; download it again") from error

    def identity(self) -> str:
        """Base identity (CONTRACTS.md): hex sha256 over every tensor's name, dtype, shape and up to 64 KiB of its bytes.

        Tensors go in name order, so the same weights sharded otherwise have the same identity. An edit between
        the sampled windows stays unseen: this tells models apart; the manifest's digests prove files.
        """
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256()
        streams = {shard.file: open(shard.file, "rb", buffering=0) for shard in self.shards}
        try:
            for name in sorted(self._infos):
                info = self._infos[name]
                digest.update(json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
                for offset, length in sample_windows(info.nbytes):
                    block = os.pread(streams[info.file].fileno(), length, info.offset + offset)
                    if len(block) != length:
                        raise CheckpointError(f"{info.file}: ended while tensor {name!r} was read; it changed under us, start again")
                    digest.update(block)
        finally:
            for stream in streams.values():
                stream.close()
        return digest.hexdigest()


def sample_windows(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the bytes that stand for a tensor of `nbytes` bytes in the base identity."""
    if nbytes <= WINDOWS * WINDOW:
        return [(0, nbytes)] if nbytes else []
    return [((nbytes - WINDOW) * index // (WINDOWS - 1), WINDOW) for index in range(WINDOWS)]


def read_into(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from `offset` on. Raises CheckpointError when the file ends early."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ended at byte {offset + done}; it changed while it was read, start again")
        done += count


def base_identity(path: str | Path) -> str:
    """`CheckpointReader(path).identity()`."""
    return CheckpointReader(path).identity()


def checkpoint_directory(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of `--model`: itself, or a hub id's snapshot (safetensors and small files only).

    Raises CheckpointError when the id cannot be resolved.
    """
    path = Path(model)
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        return path.expanduser()
    from huggingface_hub import snapshot_download

    foreign = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*"]
    try:
        return Path(snapshot_download(str(model), revision=revision, ignore_patterns=foreign))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"--model {model}: no such directory, and not on the hub ({reason}); check name and --revision") from error
