"""What a plain copy of a checkpoint takes on this machine, from a sample: fusing is held against it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.shards import data_ranges

# The sample: 1/256 of the data but enough to outweigh the sync's own latency, copied three times, of which the fastest counts:
# about 1 % of the copy it stands for.
SHARE, LEAST, MOST, TIMES = 256, 8 << 20, 128 << 20, 3


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """`seconds`: of copying and syncing all data (no holes) of the base, estimated from `sampled_bytes` of it, page cache warm.

    On a busy 2-core machine it said 1.0 to 1.9 s for 1 GiB that `cp` and `sync` took 1.6 to 2.0 s for.
    """

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
            sample = min(total, max(LEAST, min(total // SHARE, MOST)))
            seconds = min(_timed(ranges, target, sample) for _ in range(TIMES))
        finally:
            for descriptor in (target, *sources.values()):
                os.close(descriptor)
            target_file.unlink()
    except OSError:  # the disk is nearly full: no reason to lose the checkpoint
        return None
    return PlainCopy(round(seconds * total / sample, 3), sample) if sample else None


def _timed(ranges: list[tuple[int, int, int]], target: int, left: int) -> float:
    """Seconds to copy the first `left` bytes of `ranges` (file, start, stop) into an emptied file, and to sync it."""
    os.ftruncate(target, 0)
    began, at = time.perf_counter(), 0
    for source, start, stop in ranges:
        count = min(left, stop - start)
        copied = _copy_in_kernel(source, target, start, at, count)
        os.lseek(target, at + copied, os.SEEK_SET)
        while copied < count and (sent := os.sendfile(target, source, start + copied, count - copied)):
            copied += sent
        at, left = at + copied, left - count
    os.fsync(target)
    return time.perf_counter() - began


def _copy_in_kernel(source: int, target: int, offset: int, at: int, count: int) -> int:
    """Copy `count` bytes as cp does first; how many were, before the end or where that is not offered."""
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(source, target, count - done, offset + done, at + done)
        except OSError:
            break
        if not copied:
            break
        done += copied
    return done
