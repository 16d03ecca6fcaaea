"""Find the safetensors files of a model directory, one file or the shards that an index lists, and explain what to do if there are none.

Open this file when a model directory is refused before any tensor is read.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku_vllm.errors import CheckpointError, InputError

INDEX = "model.safetensors.index.json"
# Weights in formats that are neither read nor copied.
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".ot", ".tflite", ".pkl")


def check_files(directory: Path, error: type[InputError] = CheckpointError) -> None:
    """Refuse a directory with pipes, devices or dead links among its files.

    Reading a pipe may never end, and a dead link to a tokenizer would be skipped unnoticed.
    """
    for file in sorted(directory.iterdir()):
        if not file.name.endswith(FOREIGN):
            check_file(file, error)


@contextmanager
def without_adapter(path: Path) -> Iterator[Path]:
    """A model directory as transformers has to see it: without an adapter beside the weights, which it would add to them.

    Trainers leave the adapter that they merged there. `path` itself if there is none.
    """
    if not (path / "adapter_config.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sku-model-") as folder:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file.absolute())
        yield Path(folder)


def check_file(file: Path, error: type[InputError] = CheckpointError) -> None:
    """Raises `error` for a pipe, a device, a socket or a link that leads to no file."""
    if not file.is_file() and not file.is_dir() and os.path.lexists(file):
        what = "a link that leads to no file" if file.is_symlink() and not file.exists() else "a pipe, socket or device"
        raise error(f"{file}: is {what}; put the file itself there, or remove it")


def find_files(path: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The safetensors files of a model directory (or of one file) and its parsed index. Raises CheckpointError saying what is missing."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a .safetensors file; give a model directory")
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory; check the path, or download the model first")
    check_files(path)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], None
    if (path / INDEX).is_file():
        return _indexed_files(path)
    files = sorted(path.glob("*.safetensors"))
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: is an adapter, not a model; give it as --adapter and its base as --model")
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(f"{path}: {len(files)} safetensors files but no {INDEX}; save the model again with save_pretrained")
    raise CheckpointError(f"{path}: {why_no_weights(path)}")


def _indexed_files(path: Path) -> tuple[list[Path], dict[str, Any]]:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = dict(index.get("metadata") or {})
        names = sorted(set(index["weight_map"].values()))
        files = [path / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX}: not a safetensors index (bad weight_map or metadata); download it again") from error
    if not files:
        raise CheckpointError(f"{path / INDEX}: its weight_map is empty; download it again")
    for name, file in zip(names, files, strict=True):
        if file.parent != path:
            raise CheckpointError(
                f"{path / INDEX}: names {name}, which lies in another folder; put the shards beside the index, and take "
                "the folder out of its names"
            )
        if not file.is_file():
            raise CheckpointError(f"{file}: named in {INDEX} but not there; download the missing shard")
    return files, index


def why_no_weights(path: Path) -> str:
    """What is wrong with a model directory without safetensors files, and the remedy."""
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if not pickles:
        return "no safetensors weights in this directory; give a directory written by save_pretrained"
    return (
        f"holds pickled weights only ({pickles[0]}), and unpickling runs any code in them; if you trust their source, convert them: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\" and copy the tokenizer files beside them"
    )
