"""Compile the kernels of a fusion before it is timed and before its threads start, so that Ctrl-C interrupts the compiler at once.

Open this file when the first fusion on a machine compiles in the middle of the work.
"""

from collections.abc import Mapping, Sequence

import torch

from sku_vllm.adapter.delta import matrix_shape
from sku_vllm.adapter.placement import Placed, terms_of
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.checkpoint.safetensors_file import DTYPES
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.kernels.delta_merge.cpu_kernel import load_round_rows
from sku_vllm.kernels.delta_merge.merge_backend import CPU, MergeBackend

Placement = Mapping[str, Sequence[Placed]]


def load_kernels(request: FuseRequest, backend: MergeBackend, reader: CheckpointReader, placed: Placement) -> None:
    """Load the CPU's compiled pass if a weight needs it; on a GPU merge a row of every kind of edit, since Triton compiles what it runs."""
    edited = {name: edits for name, edits in placed.items() if name in reader and not reader.info(name).dtype.startswith("F8")}
    if backend is not CPU:
        return _compile_by_merging(request, backend, reader, edited)
    halves = {info.dtype for info in map(reader.info, edited) if info.dtype in ("BF16", "F16")}
    if request.seed is None and any(request.dtype in ("keep", DTYPES[half][0]) for half in halves):
        load_round_rows()


def _compile_by_merging(request: FuseRequest, backend: MergeBackend, reader: CheckpointReader, edited: Placement) -> None:
    done = set()
    for name, edits in edited.items():
        info, row = reader.info(name), edits[0].row
        terms = [term for edit in edits for term in terms_of(edit, row, row + 1)]
        columns, stored = matrix_shape(info.shape)[1], DTYPES[info.dtype][0]
        kind = info.dtype, columns % 16 == 0, *((term.b.dtype, term.a is None) for term in terms)
        if kind in done or not columns:
            continue
        done.add(kind)
        weight = torch.zeros(1, columns, dtype=getattr(torch, stored))
        out = torch.empty(1, columns, dtype=getattr(torch, stored if request.dtype == "keep" else request.dtype))
        for _ in range(2):  # the second weight is nearly equal to its edit, for which the kernel's float64 variant is compiled as well
            backend.merge(weight, terms, out=out, seed=request.seed)
            weight = -out.to(weight.dtype)
