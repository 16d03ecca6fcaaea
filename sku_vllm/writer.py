"""Output shards written in 8 MiB chunks by a few threads, so that reading, merging, hashing and writing overlap.

A chunk is the unit of everything: its bytes are the base's or merged rows; its sha256 is one leaf of the file's digest. Chunks
that are the base's throughout share its blocks where the file system can; all else goes to the disk past the page cache.
Memory is a few buffers per thread, however large the model.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sku_vllm.delta import Dense
from sku_vllm.errors import CheckpointError
from sku_vllm.kernels.delta_merge import MergeStats, Term, delta_merge_fp8_reference
from sku_vllm.kernels.delta_merge.backend import CPU, Backend
from sku_vllm.kernels.delta_merge.cpu import one_torch_thread
from sku_vllm.kernels.delta_merge.fp8 import rows_of
from sku_vllm.open_shard import PAGE, OpenShard
from sku_vllm.placement import Placed, matrix_shape
from sku_vllm.safetensors_file import DTYPES, read_into
from sku_vllm.shards import CHUNK, OutputShard, OutputTensor
from sku_vllm.simulate import simulate


@dataclass(slots=True)
class Written:
    """What the threads found out: leaf digests per file and chunk, sums per tensor and first row."""

    leaves: dict[str, dict[int, bytes]] = field(default_factory=dict)
    merged: dict[str, dict[int, MergeStats]] = field(default_factory=dict)
    simulated: dict[str, dict[str, dict[int, MergeStats]]] = field(default_factory=dict)

    def totals(self, parts: dict[int, MergeStats]) -> MergeStats:
        """Added in row order, so that the sum does not depend on which thread was faster."""
        total = MergeStats()
        for row in sorted(parts):
            total.add(parts[row])
        return total


class ShardWriter:
    """Writes planned shards into a directory.

    Args:
        digests: hash every chunk. kinds: quantisers to simulate. seed: stochastic rounding, or None.
        scales: of FP8 weights by name, with those of the result (None: kept). backend: where other weights are merged.
        progress: called with bytes done.
    """

    def __init__(
        self,
        directory: Path,
        *,
        digests: bool = True,
        kinds: Sequence[str] = (),
        seed: int | None = None,
        scales: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
        backend: Backend = CPU,
        threads: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.directory, self.digests, self.kinds, self.seed, self.progress = directory, digests, tuple(kinds), seed, progress
        self.scales, self.backend = scales or {}, backend
        self.threads = threads or min(2 * len(os.sched_getaffinity(0)), 16)  # two a core: one waits for the disk while the other merges
        self.written = Written()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._zeros = hashlib.sha256(bytes(CHUNK)).digest()

    def write(self, shards: Sequence[OutputShard]) -> Written:
        """Write them all. Any thread's error, or an interrupt, stops the others at their next chunk and is raised here."""
        with one_torch_thread():
            self._write(shards)
        return self.written

    def _write(self, shards: Sequence[OutputShard]) -> None:
        files = [OpenShard(shard, self.directory) for shard in shards]
        jobs = iter(_deal(files, self.threads))
        pool = ThreadPoolExecutor(self.threads + 1, thread_name_prefix="sku-fuse")
        syncs: list = []
        try:
            workers = [pool.submit(self._work, jobs, pool, syncs) for _ in range(self.threads)]
            wait(workers)
            for future in [*workers, *syncs]:
                future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown()
            for file in files:
                file.close()

    def _work(self, jobs: Iterator[tuple["OpenShard", int]], pool: ThreadPoolExecutor, syncs: list) -> None:
        torch.set_num_threads(1)
        buffer = torch.empty(CHUNK + PAGE, dtype=torch.uint8, pin_memory=self.backend.pinned)
        buffer = buffer[-buffer.data_ptr() % PAGE :][:CHUNK]
        try:
            while not self._stop.is_set():
                with self._lock:
                    job = next(jobs, None)
                if job is None:
                    return
                file, start = job
                stop = min(start + CHUNK, file.shard.size)
                self._write_chunk(file, start, stop, buffer[: stop - start])
                with self._lock:
                    file.remaining -= 1
                    self.progress(stop - start)
                    if not file.remaining:  # its pages go to the disk while other shards are being merged
                        syncs.append(pool.submit(os.fsync, file.target))
        except BaseException:
            self._stop.set()
            raise

    def _write_chunk(self, file: OpenShard, start: int, stop: int, buffer: Tensor) -> None:
        pieces = list(file.pieces(start, stop))
        if all(tensor is None for tensor, _, _ in pieces) and not any(file.has_data(low, high) for _, low, high in pieces):
            if self.digests:
                self._leaf(file, start, self._zeros if stop - start == CHUNK else hashlib.sha256(bytes(stop - start)).digest())
            return
        view = memoryview(buffer.numpy())
        shared = all(tensor is None for tensor, _, _ in pieces) and file.share(start, stop)
        if shared and not self.digests:
            return
        for tensor, low, high in pieces:
            if tensor is not None:
                self._render(file, tensor, low - tensor.start, high - tensor.start, buffer[low - start : high - start])
            else:
                file.read(low, view[low - start : high - start])
        if not shared:
            file.write(view, start)
        if self.digests:
            self._leaf(file, start, hashlib.sha256(view).digest())

    def _leaf(self, file: OpenShard, start: int, digest: bytes) -> None:
        with self._lock:
            self.written.leaves.setdefault(file.shard.file, {})[start] = digest

    def _render(self, file: OpenShard, tensor: OutputTensor, low: int, high: int, out: Tensor) -> None:
        """Bytes [low, high) of a computed tensor. Whole rows are computed; rows that begin before `low` are counted elsewhere."""
        if tensor.content is not None:
            out.copy_(tensor.content[low:high])
            return
        columns = matrix_shape(tensor.source.shape)[1]
        row_bytes = columns * DTYPES[tensor.dtype][1] // 8
        counted, whole, last = -(-low // row_bytes), high // row_bytes, -(-high // row_bytes)
        if low % row_bytes:  # the end of a row that began in the chunk before
            self._part(file, tensor, counted - 1, counted, low, high, out, count=False)
        aligned = (out.storage_offset() + counted * row_bytes - low) % 8 == 0
        if counted < whole and aligned:
            self._merge(file, tensor, counted, whole, True, out[counted * row_bytes - low : whole * row_bytes - low])
            counted = whole
        if counted < last:  # rows that go on in the next chunk
            self._part(file, tensor, counted, last, low, high, out, count=True)

    def _part(self, file: OpenShard, tensor: OutputTensor, begin: int, end: int, low: int, high: int, out: Tensor, count: bool) -> None:
        """The bytes of rows [begin, end) that lie in [low, high), through a buffer of their own."""
        row_bytes = matrix_shape(tensor.source.shape)[1] * DTYPES[tensor.dtype][1] // 8
        merged = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
        self._merge(file, tensor, begin, end, count, merged)
        left, right = max(low, begin * row_bytes), min(high, end * row_bytes)
        out[left - low : right - low] = merged[left - begin * row_bytes : right - begin * row_bytes]

    def _merge(self, file: OpenShard, tensor: OutputTensor, begin: int, end: int, count: bool, into: Tensor) -> None:
        """Rows [begin, end) of a computed tensor, as bytes into `into`."""
        columns = matrix_shape(tensor.source.shape)[1]
        dtype, target = (getattr(torch, DTYPES[name][0]) for name in (tensor.source.dtype, tensor.dtype))
        width = columns * dtype.itemsize
        in_place = target == dtype and not self.kinds
        raw = into if in_place else torch.empty((end - begin) * width, dtype=torch.uint8)
        read_into(file.source_of(tensor), memoryview(raw.numpy()), tensor.source.offset + begin * width, tensor.source.file)
        weight, out = raw.view(dtype).view(end - begin, columns), into.view(target).view(end - begin, columns)
        if not tensor.edits:
            return _cast(weight, out, tensor)
        terms = [term for edit in tensor.edits for term in terms_of(edit, begin, end)]
        seed = None if self.seed is None else self.seed + tensor.source.offset
        scale = self.scales.get(tensor.name)
        if scale is None:
            stats = self.backend.merge(weight, terms, out=out, seed=seed, first_element=begin * columns)
        else:
            scales = rows_of(*scale, tensor.source.shape, begin, end)
            stats = delta_merge_fp8_reference(weight, terms, scales, out=out, seed=seed, first_element=begin * columns)
            if self.kinds:
                weight = weight.float() * scales.over(scales.old, 0, end - begin, columns)
                out = out.float() * scales.over(scales.new, 0, end - begin, columns)
        if count:
            simulated = simulate(weight, out, terms, self.kinds)
            with self._lock:
                self.written.merged.setdefault(tensor.name, {})[begin] = stats
                for kind, sums in simulated.items():
                    self.written.simulated.setdefault(kind, {}).setdefault(tensor.name, {})[begin] = sums


def _deal(files: Sequence[OpenShard], threads: int) -> Iterator[tuple[OpenShard, int]]:
    """Chunks, alternating between as many files as there are threads: two that write to one file wait for its lock."""
    for first in range(0, len(files), threads):
        group = files[first : first + threads]
        for start in range(0, max(file.shard.size for file in group), CHUNK):
            yield from ((file, start) for file in group if start < file.shard.size)


def terms_of(edit: Placed, begin: int, end: int) -> Iterator[Term]:
    """The part of an edit on rows [begin, end) of the tensor, with rows counted from `begin`."""
    delta = edit.delta
    rows = matrix_shape(delta.shape)[0]
    low, high = max(begin, edit.row), min(end, edit.row + rows)
    if low >= high or edit.scale == 0:
        return
    inner = slice(low - edit.row, high - edit.row)
    if isinstance(delta, Dense):
        yield Term(delta.mapped().view(matrix_shape(delta.shape))[inner], None, edit.scale, low - begin)
    elif delta.b.ndim == 2:
        yield Term(delta.b[inner], delta.a, edit.scale * delta.scaling, low - begin)
    else:
        size = delta.b.shape[1]
        for expert in range(inner.start // size, -(-inner.stop // size)):
            start, stop = max(inner.start, expert * size), min(inner.stop, (expert + 1) * size)
            b = delta.b[expert, start - expert * size : stop - expert * size]
            yield Term(b, delta.a[expert], edit.scale * delta.scaling, edit.row + start - begin)


def _cast(weight: Tensor, out: Tensor, tensor: OutputTensor) -> None:
    out.copy_(weight)
    if bool((out.isinf() & ~weight.isinf()).any()):
        raise CheckpointError(
            f"{tensor.source.file}: {tensor.name!r} has values too large for {tensor.dtype}; use --dtype keep, bfloat16 or float32"
        )
