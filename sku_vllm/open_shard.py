"""One output file being written, and the base files its bytes come from."""

import bisect
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sku_vllm.errors import CheckpointError
from sku_vllm.safetensors_file import read_into
from sku_vllm.shards import CHUNK, OutputShard, OutputTensor, data_ranges

# copy_file_range says these where source and target cannot be joined inside the kernel.
NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class OpenShard:
    """An output file and the base files its bytes come from."""

    def __init__(self, shard: OutputShard, directory: Path) -> None:
        self.shard = shard
        self.remaining = -(-shard.size // CHUNK)
        self._starts = [tensor.start for tensor in shard.tensors]
        self._sources: dict[Path, int] = {}
        self.target = os.open(directory / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self.target, shard.size)
        for tensor in shard.tensors:
            if tensor.source.file not in self._sources:
                self._sources[tensor.source.file] = os.open(tensor.source.file, os.O_RDONLY)
        self._data = {file: data_ranges(source, os.fstat(source).st_size) for file, source in self._sources.items()}

    def close(self) -> None:
        for descriptor in (self.target, *self._sources.values()):
            os.close(descriptor)

    def source_of(self, tensor: OutputTensor) -> int:
        return self._sources[tensor.source.file]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[OutputTensor | None, int, int]]:
        """Cut [start, stop) into computed pieces (with their tensor) and copied ones (None), as long as possible."""
        position = start
        for tensor in self._overlapping(start, stop):
            if tensor.copied:
                continue
            if position < tensor.start:
                yield None, position, tensor.start
            low, high = max(tensor.start, start), min(tensor.stop, stop)
            yield tensor, low, high
            position = high
        if position < stop:
            yield None, position, stop

    def _overlapping(self, start: int, stop: int) -> Iterator[OutputTensor]:
        for tensor in self.shard.tensors[max(bisect.bisect_right(self._starts, start) - 1, 0) :]:
            if tensor.start >= stop:
                return
            if tensor.stop > start:
                yield tensor

    def _runs(self, low: int, high: int) -> Iterator[tuple[Path | None, int, int, int]]:
        """(base file, offset in it, low, high) of copied bytes; the header comes from no file."""
        position = low
        if position < len(self.shard.header):
            stop = min(high, len(self.shard.header))
            yield None, position, position, stop
            position = stop
        run: list | None = None
        for tensor in self._overlapping(position, high) if position < high else ():
            begin, end = max(tensor.start, position), min(tensor.stop, high)
            offset = tensor.source.offset + begin - tensor.start
            if run and run[0] == tensor.source.file and run[1] + run[3] - run[2] == offset:
                run[3] = end
            elif begin < end:
                if run:
                    yield tuple(run)
                run = [tensor.source.file, offset, begin, end]
        if run:
            yield tuple(run)

    def has_data(self, low: int, high: int) -> bool:
        return any(file is None or list(self._extents(file, offset, stop - start)) for file, offset, start, stop in self._runs(low, high))

    def _extents(self, file: Path, offset: int, length: int) -> Iterator[tuple[int, int]]:
        ranges = self._data[file]
        for begin, end in ranges[max(bisect.bisect_right(ranges, (offset, 1 << 62)) - 1, 0) :]:
            if begin >= offset + length:
                return
            if end > offset:
                yield max(begin, offset), min(end, offset + length)

    def read(self, low: int, view: memoryview) -> None:
        """Copied bytes from `low` on, into memory."""
        for file, offset, start, stop in self._runs(low, low + len(view)):
            part = view[start - low : stop - low]
            if file is None:
                part[:] = self.shard.header[start:stop]
            else:
                read_into(self._sources[file], part, offset, file)

    def copy(self, low: int, high: int) -> bool:
        """Copied bytes inside the kernel, holes left as holes. False where it cannot."""
        for file, offset, start, stop in self._runs(low, high):
            if file is None:
                write_all(self.target, memoryview(self.shard.header)[start:stop], start)
                continue
            for begin, end in self._extents(file, offset, stop - start):
                if not self._copy_range(file, begin, start + begin - offset, end - begin):
                    return False
        return True

    def _copy_range(self, file: Path, source: int, target: int, count: int) -> bool:
        copied = copy_in_kernel(self._sources[file], self.target, source, target, count)
        if copied < count and os.fstat(self._sources[file]).st_size < source + count:
            raise CheckpointError(f"{file}: ended at byte {source + copied}; it changed while it was read, start again")
        return copied == count


def copy_in_kernel(source: int, target: int, offset: int, at: int, count: int) -> int:
    """Copy bytes [offset, offset + count) of one file to `at` in another; how many were, before the end or where that is not offered."""
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(source, target, count - done, offset + done, at + done)
        except OSError as error:
            if error.errno in NOT_HERE:
                break
            raise
        if not copied:
            break
        done += copied
    return done


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
