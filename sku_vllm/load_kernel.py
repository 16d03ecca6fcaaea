"""The kernel that fusing will want, compiled before the clock starts and before any thread waits for it: Ctrl-C stops it at once."""

from collections.abc import Mapping, Sequence

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.kernels.delta_merge.backend import CPU, Backend
from sku_vllm.kernels.delta_merge.cpu_kernel import load_round_rows
from sku_vllm.placement import Placed, matrix_shape
from sku_vllm.safetensors_file import DTYPES


def load_kernel(backend: Backend, reader: CheckpointReader, placed: Mapping[str, Sequence[Placed]], dtype: str, seed: int | None) -> None:
    """The CPU's compiled pass where it fits; elsewhere one row of every kind of edit is merged, since Triton compiles what it runs."""
    edited = {name: edits for name, edits in placed.items() if name in reader and not reader.info(name).dtype.startswith("F8")}
    if backend is not CPU:
        return _merge_rows(backend, reader, edited, dtype, seed)
    halves = {info.dtype for info in map(reader.info, edited) if info.dtype in ("BF16", "F16")}
    if seed is None and any(dtype in ("keep", DTYPES[half][0]) for half in halves):
        load_round_rows()


def _merge_rows(backend: Backend, reader: CheckpointReader, edited: Mapping[str, Sequence[Placed]], dtype: str, seed: int | None) -> None:
    import torch

    from sku_vllm.writer import terms_of

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
        out = torch.empty(1, columns, dtype=getattr(torch, stored if dtype == "keep" else dtype))
        for _ in range(2):  # the second row is all but cancelled by its edit, which the kernel sums again in float64
            backend.merge(weight, terms, out=out, seed=seed)
            weight = -out.to(weight.dtype)
