"""Read safetensors checkpoints lazily: headers first, and the bytes of a tensor only when it is requested.

Neither torch nor transformers is imported until a tensor is asked for, so identities and errors are quick. Open this file to
change how a model directory or a hub id becomes tensors.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.checkpoint.files import check_file, find_files
from sku_vllm.checkpoint.identity import identity_of
from sku_vllm.checkpoint.safetensors_file import DTYPES, TensorInfo, read_into, read_shard
from sku_vllm.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class CheckpointReader:
    """A model directory (single file, or sharded with an index) or one .safetensors file.

    Attributes:
        path: what was opened. shards: one `Shard` per file, in name order.
        index: the parsed index file, or None. As in transformers, it says which files there are, and the files say which tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files, self.index = find_files(self.path)
        self.shards = tuple(read_shard(file) for file in files)
        self._infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, Any] = {}
        for shard in self.shards:
            for info in shard.tensors:
                if info.name in self._infos:
                    other = self._infos[info.name].file.name
                    raise CheckpointError(f"{shard.file}: tensor {info.name!r} is also in {other}; remove one copy")
                self._infos[info.name] = info

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
        """Read one tensor into new memory. Raises CheckpointError for a missing tensor, or a dtype that torch does not have."""
        import torch

        info = self.info(name)
        dtype = DTYPES.get(info.dtype, (None, 0))[0]
        if dtype is None or not hasattr(torch, dtype):
            raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}, which torch cannot hold; use an unquantised model")
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        if info.nbytes:
            with open(info.file, "rb", buffering=0) as stream:
                read_into(stream.fileno(), raw.numpy().data, info.offset, info.file)
        return raw.view(getattr(torch, dtype)).reshape(info.shape)

    def mapped(self, name: str) -> "torch.Tensor":
        """One tensor as a view of the memory-mapped file, to be read only: pages are loaded when used and can be dropped again."""
        import mmap

        import torch

        info = self.info(name)
        dtype = getattr(torch, DTYPES.get(info.dtype, ("",))[0], None)
        if dtype is None or not info.nbytes or info.offset % dtype.itemsize:
            return self.tensor(name)
        if info.file not in self._maps:
            with open(info.file, "rb") as stream:  # mapped writable since torch warns of read-only memory; nothing writes to it
                self._maps[info.file] = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(self._maps[info.file], dtype=dtype, count=info.nbytes // dtype.itemsize, offset=info.offset).reshape(
            info.shape
        )

    @property
    def directory(self) -> Path:
        """The directory of config.json, the tokenizer and the other small files."""
        return self.path if self.path.is_dir() else self.path.parent

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json beside the weights; empty when there is none. Raises CheckpointError."""
        file = self.directory / "config.json"
        check_file(file)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not valid JSON; download it again") from error
        if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), dict | None):
            raise CheckpointError(f"{file}: not a model's configuration; download it again")
        return config

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that transformers loads it in unless told: its config's, else that of most weights. None if it is quantised."""
        if self.config.get("quantization_config"):
            return None
        for config in (self.config, self.config.get("text_config") or {}):
            if named := config.get("dtype") or config.get("torch_dtype"):
                return str(named)
        sizes: dict[str, int] = {}
        for info in self._infos.values():
            name = DTYPES.get(info.dtype, ("",))[0]
            if "float" in name:
                sizes[name] = sizes.get(name, 0) + info.nbytes
        return max(sizes, key=lambda name: sizes[name], default=None)

    def identity(self) -> str:
        """The base identity, hex (see `identity_of`); computed once."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        return identity_of(self._infos.values())


def base_identity(path: str | Path) -> str:
    """`CheckpointReader(path).identity()`."""
    return CheckpointReader(path).identity()


def checkpoint_directory(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of `--model`: the directory itself, or the downloaded snapshot of a hub id (safetensors and small files only).

    Raises CheckpointError when the id cannot be resolved, or a revision is asked of a directory.
    """
    path = Path(model).expanduser()
    if revision and os.path.exists(path):
        raise CheckpointError(f"--revision {revision}: {path} is a directory, which has no revisions; leave the flag out")
    if os.path.exists(path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        return path
    from huggingface_hub import snapshot_download

    foreign = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*"]
    try:
        return Path(snapshot_download(str(model), revision=revision, ignore_patterns=foreign))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"--model {model}: no such directory, and not on the hub ({reason}); check name and --revision") from error
