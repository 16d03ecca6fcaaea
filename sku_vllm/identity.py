"""Base identity (CONTRACTS.md): which model an adapter was trained on."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack

from sku_vllm.errors import CheckpointError
from sku_vllm.safetensors_file import TensorInfo

# 16 windows of 4 KiB spread evenly over a tensor, both ends included; a tensor of at most 64 KiB is read whole.
WINDOWS, WINDOW = 16, 4096


def identity_of(infos: Iterable[TensorInfo]) -> str:
    """Hex sha256 over every tensor's name, dtype, shape and up to 64 KiB of its bytes.

    Tensors go in name order, so the same weights sharded otherwise have the same identity. An edit between
    the sampled windows stays unseen: this tells models apart; the manifest's digests prove files.
    """
    infos = sorted(infos, key=lambda info: info.name)
    digest = hashlib.sha256()
    with ExitStack() as opened:
        streams = {file: opened.enter_context(open(file, "rb", buffering=0)) for file in {info.file for info in infos}}
        for info in infos:
            digest.update(json.dumps([info.name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
            for offset, length in sample_windows(info.nbytes):
                block = os.pread(streams[info.file].fileno(), length, info.offset + offset)
                if len(block) != length:
                    raise CheckpointError(f"{info.file}: ended while tensor {info.name!r} was read; it changed under us, start again")
                digest.update(block)
    return digest.hexdigest()


def sample_windows(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the bytes that stand for a tensor of `nbytes` bytes in the base identity."""
    if nbytes <= WINDOWS * WINDOW:
        return [(0, nbytes)] if nbytes else []
    return [((nbytes - WINDOW) * index // (WINDOWS - 1), WINDOW) for index in range(WINDOWS)]
