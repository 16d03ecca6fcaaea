"""What a plain copy of a checkpoint takes on this machine, from a sample: fusing is held against it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.open_shard import NOT_HERE
from sku_vllm.shards import data_ranges

# The sample: 1/128 of the data, so that it costs about 1 % of the copy it stands for, but enough to outweigh the sync's own latency.
SHARE, LEAST, MOST = 128, 8 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """`seconds`: of copying and syncing all data (no holes) of the base, estimated from `sampled_bytes` of it, page cache warm."""

    seconds: float
    sampled_bytes: int


def estimate_copy(reader: CheckpointReader, directory: Path) -> PlainCopy | None:
    """Copy a sample of the base into a file of `directory`, sync and remove it. None when that fails or there is nothing to copy."""
    target_file = directory / ".plain_copy"
    try:
        sizes = {shard.file: shard.size for shard in reader.shards}
        sources = {file: os.open(file, os.O_RDONLY) for file in sizes}
        target = os.open(target_file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            ranges = [(source, *span) for file, source in sources.items() for span in data_ranges(source, sizes[file])]
            total = sum(stop - start for _, start, stop in ranges)
            sample = left = min(total, max(LEAST, min(total // SHARE, MOST)))
            began = time.perf_counter()
            for source, start, stop in ranges:
                _copy(source, target, start, min(left, stop - start))
                left = max(left - (stop - start), 0)
            os.fsync(target)
            seconds = time.perf_counter() - began
        finally:
            for descriptor in (target, *sources.values()):
                os.close(descriptor)
            target_file.unlink()
    except OSError:  # the disk is nearly full: no reason to lose the checkpoint
        return None
    return PlainCopy(round(seconds * total / sample, 3), sample) if sample else None


def _copy(source: int, target: int, offset: int, count: int) -> None:
    while count:
        try:
            copied = os.copy_file_range(source, target, count, offset)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            copied = os.sendfile(target, source, offset, count)
        if not copied:
            return
        offset, count = offset + copied, count - copied
