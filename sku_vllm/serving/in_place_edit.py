"""Subtracts an adapter from the weights of a running worker in place, without loading the model again.

One checkpoint tensor may fill some rows of a packed qkv, the columns of a tensor-parallel shard, or one of a stack of experts. To
find out which, the model's own loader is run over the checkpoint and its copies are recorded instead of made. Weights that differ
from the checkpoint's after loading (repacked, transposed, padded) cannot be edited in place; then `Untraceable` is raised.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sku_vllm.adapter.delta import matrix_shape
from sku_vllm.adapter.placement import Placed, terms_of
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.kernels.delta_merge import Merge, MergeStats, Summand, delta_merge

# Most bytes of adapter factors copied to the device at a time: low-rank edits fit into one kernel launch, dense ones need several.
AT_ONCE = 2**28


class Window(NamedTuple):
    """A part of a parameter that one checkpoint tensor fills.

    part: a view [rows, columns] of the parameter. row, column: where in the checkpoint tensor's matrix that part begins.
    """

    part: Tensor
    row: int
    column: int


class Untraceable(Exception):
    """The weights cannot be edited in place: the model's loader does more than copy, or the parameters differ from the checkpoint."""


class CopyTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """While active, records every copy from a checkpoint tensor into the model's parameters instead of carrying it out.

    model: the addresses of the storages of the model's parameters and buffers.
    """

    def __init__(self, model: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.model = model
        self.sources: dict[int, tuple[str, Tensor]] = {}
        self.windows: dict[str, list[Window]] = {}

    def offer(self, reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
        """Yield every checkpoint tensor as a memory-mapped view, and remember its storage's address to recognise copies from it."""
        for name in reader.names:
            tensor = reader.mapped(name)
            self.sources[address(tensor)] = name, tensor
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not func._schema.is_mutable or not isinstance(args[0], Tensor) or address(args[0]) not in self.model:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note(*args[:2])
        elif func.overloadpacket not in (torch.ops.aten.fill_, torch.ops.aten.zero_):  # filling in padding, which was done at loading
            raise Untraceable(f"the loader computes with {func}")
        return args[0]

    def _note(self, target: Tensor, source: Tensor) -> None:
        name, whole = self.sources.get(address(source), (None, None))
        if name is None or whole is None or source.shape != target.shape or source.dtype != whole.dtype:
            raise Untraceable(f"a copy of {list(source.shape)} does not come straight from the checkpoint")
        self.windows.setdefault(name, []).append(window(target, source, matrix_shape(whole.shape)[1], name))


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, which identifies the storage."""
    return tensor.untyped_storage().data_ptr()


def window(target: Tensor, source: Tensor, columns: int, name: str) -> Window:
    """The window of a copy from `source`, a view of a checkpoint tensor whose matrix has `columns` columns, to `target`.

    Raises:
        Untraceable: source or target is not made of rows with contiguous elements.
    """
    try:
        parts = [each.unsqueeze(-1) if each.ndim < 2 else each.view(-1, each.shape[-1]) for each in (target, source)]
    except RuntimeError as error:
        raise Untraceable(f"{name}: {error}") from error
    held, taken = parts
    if any(each.shape[1] > 1 and each.stride(1) != 1 for each in parts) or (taken.shape[0] > 1 and taken.stride(0) != columns):
        raise Untraceable(f"{name}: is transposed while it is loaded")
    row, column = divmod(int(taken.storage_offset()), columns)
    return Window(held, row, column)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Take the LoRA wrappers out of the model during the block: vLLM 0.27's weight loader does not find the layers inside them."""
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.base_layer
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


class InPlaceEdit:
    """The weights of one rank, with the window of every checkpoint tensor. edited: checkpoint tensors that `subtract` has changed."""

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        """Find the windows. Raises Untraceable, or what the loader raises, if the model's layers were changed after loading."""
        before = [(parameter, parameter.data) for parameter in model.parameters()]
        tracer = CopyTracer({address(data) for _, data in before} | {address(buffer) for buffer in model.buffers()})
        try:
            with torch.no_grad(), without_adapters(model), tracer:
                model.load_weights(tracer.offer(reader))  # type: ignore[operator]  # mypy takes it for a tensor
        finally:
            moved = [(parameter, data) for parameter, data in before if parameter.data_ptr() != data.data_ptr()]
            for parameter, data in moved:
                parameter.data = data
        if moved:
            raise Untraceable("the loader puts other tensors in the place of the model's")
        self.reader, self.windows = reader, tracer.windows
        self.edited: list[str] = []

    def base(self, name: str, where: Window) -> Tensor:
        """The base's elements for this window, a view of the file."""
        whole = self.reader.mapped(name)
        rows, columns = where.part.shape
        matrix = whole.view(matrix_shape(whole.shape))
        return matrix[where.row : where.row + rows, where.column : where.column + columns]

    def check(self, names: Sequence[str]) -> None:
        """Compare 64 rows of each unedited window with the checkpoint. Raises Untraceable where they are not equal bit for bit."""
        for name in names:
            for where in self.windows.get(name, ()) if name not in self.edited else ():
                expected = self.base(name, where)
                rows = torch.linspace(0, len(expected) - 1, min(64, len(expected))).long()
                served = where.part[rows.to(where.part.device)].cpu()
                if served.dtype != expected.dtype or not torch.equal(served, expected[rows]):
                    raise Untraceable(f"{name}: is served in another type or order than the checkpoint's")

    def subtract(self, placed: Mapping[str, Sequence[Placed]]) -> list[MergeStats]:
        """Set the weights to base − Σ scale·delta, rounded as `sku fuse` rounds. An earlier edit is undone first."""
        self.restore()
        self.edited = list(placed)
        stats: list[MergeStats] = []
        batch: list[Merge] = []
        with torch.no_grad():
            for name, edits in placed.items():
                for where in self.windows.get(name, ()):
                    terms = [term for edit in edits for term in _terms(edit, where)]
                    batch += [Merge(where.part, terms)] if terms else []
                    if sum(each.nbytes for merge in batch for term in merge.terms for each in term[:2] if each is not None) > AT_ONCE:
                        stats, batch = stats + delta_merge(batch), []
            return stats + (delta_merge(batch) if batch else [])

    def restore(self) -> None:
        """Copy the base's values back from its files, which is exact; adding the edit back would leave rounding errors."""
        with torch.no_grad():
            for name in self.edited:
                for where in self.windows.get(name, ()):
                    where.part.copy_(self.base(name, where))
        self.edited = []


def _terms(edit: Placed, where: Window) -> Iterator[Summand]:
    """The part of an edit that concerns this window, copied to the window's device."""
    rows, columns = where.part.shape
    inner, device = slice(where.column, where.column + columns), where.part.device
    for b, a, coefficient, row in terms_of(edit, where.row, where.row + rows):
        if a is None:
            yield Summand(b[:, inner].to(device), None, coefficient, row)
        else:
            yield Summand(b.to(device), a[:, inner].to(device), coefficient, row)
