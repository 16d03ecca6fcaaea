"""An edit of weights where they lie: the delta merge in place, on every part of every tensor that this rank holds.

Which elements of which parameter a checkpoint tensor fills (rows of a packed qkv, columns of a tensor-parallel shard, a stack
of experts) is not written down here: the model's own loader is run over the checkpoint, and every copy it wants to make is
noted instead of made. What holds other bits than the checkpoint afterwards (repacked, transposed, padded anew) is not edited.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.kernels.delta_merge import Merge, MergeStats, Term, delta_merge
from sku_vllm.placement import Placed, matrix_shape
from sku_vllm.writer import terms_of

# Bytes of factors that lie on the device at a time: low-rank edits go in one launch, dense ones in several.
AT_ONCE = 2**28


class Window(NamedTuple):
    """`resident` [rows, cols], part of a parameter, holds the checkpoint tensor's matrix from (row, column) on."""

    resident: Tensor
    row: int
    column: int


class Untraceable(Exception):
    """The loader does more than copy."""


class CopyTracer(TorchDispatchMode):
    """Notes every copy from a checkpoint tensor into the model, and lets nothing be written there.

    model: its storages by address.
    """

    def __init__(self, model: set[int]) -> None:
        super().__init__()
        self.model = model
        self.sources: dict[int, tuple[str, Tensor]] = {}
        self.windows: dict[str, list[Window]] = {}

    def offer(self, reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as a view of its file, remembered by where its storage lies."""
        for name in reader.names:
            tensor = reader.mapped(name)
            self.sources[address(tensor)] = name, tensor
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not func._schema.is_mutable or not isinstance(args[0], Tensor) or address(args[0]) not in self.model:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note(*args[:2])
        elif func.overloadpacket not in (torch.ops.aten.fill_, torch.ops.aten.zero_):  # padding, which is there already
            raise Untraceable(f"the loader computes with {func}")
        return args[0]

    def _note(self, target: Tensor, source: Tensor) -> None:
        name, whole = self.sources.get(address(source), (None, None))
        if name is None or whole is None or source.shape != target.shape or source.dtype != whole.dtype:
            raise Untraceable(f"a copy of {list(source.shape)} does not come straight from the checkpoint")
        self.windows.setdefault(name, []).append(window(target, source, matrix_shape(whole.shape)[1], name))


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def window(target: Tensor, source: Tensor, columns: int, name: str) -> Window:
    """Where a view of a checkpoint tensor goes. Raises Untraceable unless both are rows of contiguous elements."""
    try:
        parts = [each.unsqueeze(-1) if each.ndim < 2 else each.view(-1, each.shape[-1]) for each in (target, source)]
    except RuntimeError as error:
        raise Untraceable(f"{name}: {error}") from error
    resident, taken = parts
    if any(each.shape[1] > 1 and each.stride(1) != 1 for each in parts) or (taken.shape[0] > 1 and taken.stride(0) != columns):
        raise Untraceable(f"{name}: is transposed while it is loaded")
    row, column = divmod(taken.storage_offset(), columns)
    return Window(resident, row, column)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as its loader knows it, its LoRA wrappers out of the way (vLLM 0.27's loader does not see through them)."""
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


class Resident:
    """One rank's weights, held against the base's checkpoint. `edited`: the tensors that hold something else by our doing."""

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        """Raises Untraceable, or whatever the loader raises, where the model no longer has the shape it was loaded in."""
        before = [(parameter, parameter.data) for parameter in model.parameters()]
        tracer = CopyTracer({address(data) for _, data in before} | {address(buffer) for buffer in model.buffers()})
        try:
            with torch.no_grad(), without_adapters(model), tracer:
                model.load_weights(tracer.offer(reader))  # type: ignore[operator]
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
        rows, columns = where.resident.shape
        matrix = whole.view(matrix_shape(whole.shape))
        return matrix[where.row : where.row + rows, where.column : where.column + columns]

    def check(self, names: Sequence[str]) -> None:
        """Raises Untraceable where rows of a tensor, 64 of each window, are not resident bit for bit as the checkpoint has them."""
        for name in names:
            for where in self.windows.get(name, ()) if name not in self.edited else ():
                expected = self.base(name, where)
                rows = torch.linspace(0, len(expected) - 1, min(64, len(expected))).long()
                resident = where.resident[rows.to(where.resident.device)].cpu()
                if resident.dtype != expected.dtype or not torch.equal(resident, expected[rows]):
                    raise Untraceable(f"{name}: is served in another type or order than the checkpoint's")

    def subtract(self, placed: Mapping[str, Sequence[Placed]]) -> list[MergeStats]:
        """Base − Σ scale·delta, whatever was edited before; the same rounding as a fuse."""
        self.restore()
        self.edited = list(placed)
        stats: list[MergeStats] = []
        batch: list[Merge] = []
        with torch.no_grad():
            for name, edits in placed.items():
                for where in self.windows.get(name, ()):
                    terms = [term for edit in edits for term in _terms(edit, where)]
                    batch += [Merge(where.resident, terms)] if terms else []
                    if sum(each.nbytes for merge in batch for term in merge.terms for each in term[:2] if each is not None) > AT_ONCE:
                        stats, batch = stats + delta_merge(batch), []
            return stats + (delta_merge(batch) if batch else [])

    def restore(self) -> None:
        """The base's bits back, from its files: subtracting an edit twice with opposite signs would not be exact."""
        with torch.no_grad():
            for name in self.edited:
                for where in self.windows.get(name, ()):
                    where.resident.copy_(self.base(name, where))
        self.edited = []


def _terms(edit: Placed, where: Window) -> Iterator[Term]:
    """The part of an edit that falls into a window, on its device."""
    rows, columns = where.resident.shape
    inner, device = slice(where.column, where.column + columns), where.resident.device
    for b, a, coefficient, row in terms_of(edit, where.row, where.row + rows):
        if a is None:
            yield Term(b[:, inner].to(device), None, coefficient, row)
        else:
            yield Term(b.to(device), a[:, inner].to(device), coefficient, row)
