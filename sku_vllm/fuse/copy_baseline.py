"""The time a plain copy of a checkpoint takes on this machine, estimated from a sample: the least that fusing could take.

Open this file to change what `plain_copy` in the report means.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.checkpoint.safetensors_file import data_ranges

# The sample is 1/256 of the data, at least 8 MiB so that it outweighs the latency of a sync, and at most 128 MiB. It is copied three
# times, of which the fastest counts: together about 1 % of the work of a full copy.
SHARE, LEAST, MOST, TIMES = 256, 8 << 20, 128 << 20, 3


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """Estimated `seconds` to copy and sync the data (not the holes) of the base with a warm page cache, from `sampled_bytes` of it.

    For 1 GiB on a busy 2-core machine the estimates were 1.0 to 1.9 s, and `cp` with `sync` took 1.6 to 2.0 s.
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
    except OSError:  # for instance a full disk; the checkpoint is complete without the estimate
        return None
    return PlainCopy(round(seconds * total / sample, 3), sample) if sample else None


def _timed(ranges: list[tuple[int, int, int]], target: int, left: int) -> float:
    """Seconds to copy the first `left` bytes of `ranges` (file, start, stop) into an emptied file, and to sync it."""
    os.ftruncate(target, 0)
    began, at = time.perf_counter(), 0
    for source, start, stop in ranges:
        count = min(left, stop - start)
        copied = _copy_file_range(source, target, start, at, count)
        os.lseek(target, at + copied, os.SEEK_SET)
        while copied < count and (sent := os.sendfile(target, source, start + copied, count - copied)):
            copied += sent
        at, left = at + copied, left - count
    os.fsync(target)
    return time.perf_counter() - began


def _copy_file_range(source: int, target: int, offset: int, at: int, count: int) -> int:
    """Copy `count` bytes by copy_file_range, as cp tries first. Returns how many: fewer at the end, 0 if not supported."""
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
