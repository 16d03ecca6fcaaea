"""Write output shards in 8 MiB chunks by a few threads, so that reading, merging, hashing and writing overlap.

A chunk consists of bytes copied from the base and merged rows; the sha256s of a file's chunks make its digest. A chunk that is copied
throughout shares the base's disk blocks where the file system can; others are written past the page cache (`shard_file.py`). Memory is a
few buffers per thread, however large the model. Open this file to change how the work is shared among threads.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sku_vllm.adapter.delta import matrix_shape
from sku_vllm.adapter.placement import terms_of
from sku_vllm.checkpoint.safetensors_file import CHUNK, DTYPES, read_into
from sku_vllm.errors import CheckpointError
from sku_vllm.fuse.check_quantisers import Quantiser
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.fuse.shard_file import PAGE, OpenShard
from sku_vllm.fuse.shard_plan import FusePlan, OutputTensor
from sku_vllm.kernels.delta_merge import MergeStats, delta_merge_fp8_reference
from sku_vllm.kernels.delta_merge.cpu import one_torch_thread
from sku_vllm.kernels.delta_merge.fp8 import rows_of
from sku_vllm.kernels.delta_merge.merge_backend import MergeBackend
from sku_vllm.quantize import QUANTISERS, simulate

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Written:
    """What the threads recorded while writing.

    leaves: sha256 of every chunk, by file and first byte. merged: sums of merged rows, by tensor and first row. simulated: the sums of
    `simulate` and of `check`, by quantiser, tensor and first row.
    """

    leaves: dict[str, dict[int, bytes]] = field(default_factory=dict)
    merged: dict[str, dict[int, MergeStats]] = field(default_factory=dict)
    simulated: dict[str, dict[str, dict[int, MergeStats]]] = field(default_factory=dict)

    def totals(self, parts: dict[int, MergeStats]) -> MergeStats:
        """Sum of `parts`, added in row order, so that it does not depend on which thread was faster."""
        total = MergeStats()
        for row in sorted(parts):
            total.add(parts[row])
        return total


class ShardWriter:
    """Writes planned shards into a directory.

    Args:
        request: digests, simulate and seed decide what is hashed, simulated and rounded how.
        plan: the shards, and the scales of FP8 weights.
        backend: where weights other than FP8 are merged.
        checks: quantisers of record, by kind, run beside the simulated ones.
        progress: called with bytes done and bytes in all.
    """

    def __init__(
        self,
        directory: Path,
        request: FuseRequest,
        plan: FusePlan,
        backend: MergeBackend,
        checks: Mapping[str, Quantiser],
        progress: Progress,
    ) -> None:
        self.directory, self.plan, self.backend, self.progress = directory, plan, backend, progress
        self.digests, self.seed = request.digests, request.seed
        self.quantisers: dict[str, Quantiser] = {kind: _of_any_name(QUANTISERS[kind]) for kind in request.simulate}
        self.quantisers |= checks
        self.threads = min(2 * len(os.sched_getaffinity(0)), 16)  # two a core: one waits for the disk while the other merges
        self.done = 0
        self.written = Written()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._zeros = hashlib.sha256(bytes(CHUNK)).digest()

    def write(self) -> Written:
        """Write all shards. Any thread's error, or an interrupt, stops the others at their next chunk and is raised here."""
        with one_torch_thread():
            self._write()
        return self.written

    def _write(self) -> None:
        files = [OpenShard(shard, self.directory) for shard in self.plan.shards]
        jobs = iter(_chunks_in_order(files, self.threads))
        pool = ThreadPoolExecutor(self.threads + 1, thread_name_prefix="sku-fuse")
        syncs: list[Future[None]] = []
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

    def _work(self, jobs: Iterator[tuple[OpenShard, int]], pool: ThreadPoolExecutor, syncs: list[Future[None]]) -> None:
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
                    self.done += stop - start
                    self.progress(self.done, self.plan.size)
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
        view = buffer.numpy().data
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
        """Write bytes [low, high) of a computed tensor to `out`.

        Rows are merged whole, so a row that two chunks share is merged twice; its sums are recorded with the chunk that it begins in.
        """
        if tensor.content is not None:
            out.copy_(tensor.content[low:high])
            return
        columns = matrix_shape(tensor.source.shape)[1]
        row_bytes = columns * DTYPES[tensor.dtype][1] // 8
        row, whole_rows_end, rows_end = -(-low // row_bytes), high // row_bytes, -(-high // row_bytes)
        if low % row_bytes:  # the end of a row that began in the chunk before
            self._part(file, tensor, row - 1, row, low, high, out, count=False)
        aligned = (out.storage_offset() + row * row_bytes - low) % 8 == 0
        if row < whole_rows_end and aligned:
            self._merge(file, tensor, row, whole_rows_end, True, out[row * row_bytes - low : whole_rows_end * row_bytes - low])
            row = whole_rows_end
        if row < rows_end:  # rows that go on in the next chunk, or all of them where `out` is not aligned
            self._part(file, tensor, row, rows_end, low, high, out, count=True)

    def _part(self, file: OpenShard, tensor: OutputTensor, begin: int, end: int, low: int, high: int, out: Tensor, count: bool) -> None:
        """Merge rows [begin, end) in a temporary buffer and copy those of their bytes that lie in [low, high) to `out`."""
        row_bytes = matrix_shape(tensor.source.shape)[1] * DTYPES[tensor.dtype][1] // 8
        merged = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
        self._merge(file, tensor, begin, end, count, merged)
        left, right = max(low, begin * row_bytes), min(high, end * row_bytes)
        out[left - low : right - low] = merged[left - begin * row_bytes : right - begin * row_bytes]

    def _merge(self, file: OpenShard, tensor: OutputTensor, begin: int, end: int, count: bool, into: Tensor) -> None:
        """Merge (or cast) rows [begin, end) of a computed tensor into the bytes `into`; `count`: record the sums."""
        columns = matrix_shape(tensor.source.shape)[1]
        dtype, target = (getattr(torch, DTYPES[name][0]) for name in (tensor.source.dtype, tensor.dtype))
        width = columns * dtype.itemsize
        in_place = target == dtype and not self.quantisers
        raw = into if in_place else torch.empty((end - begin) * width, dtype=torch.uint8)
        read_into(file.source_of(tensor), raw.numpy().data, tensor.source.offset + begin * width, tensor.source.file)
        weight, out = raw.view(dtype).view(end - begin, columns), into.view(target).view(end - begin, columns)
        if not tensor.edits:
            return _cast(weight, out, tensor)
        terms = [term for edit in tensor.edits for term in terms_of(edit, begin, end)]
        seed = None if self.seed is None else self.seed + tensor.source.offset
        scale = self.plan.scales.get(tensor.name)
        if scale is None:
            stats = self.backend.merge(weight, terms, out=out, seed=seed, first_element=begin * columns)
        else:
            scales = rows_of(scale.old, scale.new, tensor.source.shape, begin, end)
            stats = delta_merge_fp8_reference(weight, terms, scales, out=out, seed=seed, first_element=begin * columns)
            if self.quantisers:
                weight = weight.float() * scales.over(scales.old, 0, end - begin, columns)
                out = out.float() * scales.over(scales.new, 0, end - begin, columns)
        if count:
            named = {kind: partial(run, tensor.name) for kind, run in self.quantisers.items()}
            simulated = simulate(weight, out, terms, named) if named else {}
            with self._lock:
                self.written.merged.setdefault(tensor.name, {})[begin] = stats
                for kind, sums in simulated.items():
                    self.written.simulated.setdefault(kind, {}).setdefault(tensor.name, {})[begin] = sums


def _chunks_in_order(files: Sequence[OpenShard], threads: int) -> Iterator[tuple[OpenShard, int]]:
    """(file, first byte) of every chunk, alternating among as many files as threads: writers of one file wait for each other."""
    for first in range(0, len(files), threads):
        group = files[first : first + threads]
        for start in range(0, max(file.shard.size for file in group), CHUNK):
            yield from ((file, start) for file in group if start < file.shard.size)


def _cast(weight: Tensor, out: Tensor, tensor: OutputTensor) -> None:
    out.copy_(weight)
    if bool((out.isinf() & ~weight.isinf()).any()):
        raise CheckpointError(
            f"{tensor.source.file}: {tensor.name!r} has values too large for {tensor.dtype}; use --dtype keep, bfloat16 or float32"
        )


def _of_any_name(quantise: Callable[[Tensor], Tensor]) -> Quantiser:
    """A quantiser that takes every weight alike."""
    return lambda _name, weight: quantise(weight)
