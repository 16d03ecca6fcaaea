"""Open the base and the adapters of a fusion, check that they fit each other, and check at the end that no file has changed.

Open this file to change what is read, or what happens when a file changes meanwhile.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.adapter.adapter import LoraAdapter, load_adapter
from sku_vllm.checkpoint.reader import CheckpointReader, checkpoint_directory
from sku_vllm.checkpoint.safetensors_file import fingerprint
from sku_vllm.errors import RunError
from sku_vllm.fuse.checks import check_complete, check_unquantised
from sku_vllm.fuse.fuse_request import FuseRequest


@dataclass(frozen=True, slots=True)
class Sources:
    """The opened base, the adapters in the request's order, and the fingerprint of every file they are read from."""

    reader: CheckpointReader
    adapters: tuple[LoraAdapter, ...]
    found: dict[Path, tuple[int, int, int]]

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block writes, compute base identity and adapter digests in a thread (reader and adapters keep them for the report);
        after it, make sure that what was read is still what was opened.

        Raises:
            RunError: a file has changed; names its directory.
        """
        with ThreadPoolExecutor(1) as aside:
            aside.submit(self.reader.identity)
            for adapter in self.adapters:
                aside.submit(getattr, adapter, "digest")
            yield
        changed = [str(file.parent) for file, now in fingerprint(self.found).items() if now != self.found[file]]
        if changed:
            raise RunError(f"{changed[0]}: changed while it was read; nothing was written, start again when nothing else writes to it")


def open_sources(request: FuseRequest) -> Sources:
    """Open base and adapters, and check that they belong together.

    Raises:
        CheckpointError: the base cannot be read, or its weights are codes of a quantiser.
        AdapterError: an adapter cannot be read, is negated, or was trained on another base.
    """
    reader = CheckpointReader(checkpoint_directory(request.model, request.revision))
    found = fingerprint(shard.file for shard in reader.shards)
    adapters = tuple(load_adapter(path, as_is=request.as_is) for path, _ in request.adapters)
    found |= fingerprint(adapter.file for adapter in adapters)
    check_unquantised(reader, request.dtype, adapters)
    check_complete(reader)
    for adapter in adapters:
        adapter.check_base(reader, request.any_base)
    return Sources(reader, adapters, found)
