"""Base identity: a hash that tells models apart without reading all of their bytes. Adapters record that of the model they were trained on.

Open this file to see what the hash covers; after a change no recorded `base_identity` matches any more.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack

from sku_vllm.checkpoint.safetensors_file import TensorInfo
from sku_vllm.errors import CheckpointError

# 16 windows of 4 KiB spread evenly over a tensor, both ends included; a tensor of at most 64 KiB is read whole.
WINDOWS, WINDOW = 16, 4096


def identity_of(infos: Iterable[TensorInfo]) -> str:
    """Hex sha256 over every tensor's name, dtype, shape and up to 64 KiB of its bytes.

    Tensors go in name order, so the identity does not depend on how the weights are sharded. A change between
    the sampled windows is not noticed: to prove that files are unchanged, use the manifest's digests.
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
                    raise CheckpointError(f"{info.file}: ended while tensor {info.name!r} was read; it changed meanwhile, start again")
                digest.update(block)
    return digest.hexdigest()


def sample_windows(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the bytes of a tensor of `nbytes` bytes that the base identity hashes."""
    if nbytes <= WINDOWS * WINDOW:
        return [(0, nbytes)] if nbytes else []
    return [((nbytes - WINDOW) * index // (WINDOWS - 1), WINDOW) for index in range(WINDOWS)]
