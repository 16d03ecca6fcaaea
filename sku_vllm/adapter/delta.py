"""The delta of one base weight, which fusing subtracts: a pair of low-rank factors, or a whole tensor.

Open this file to add another form of delta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sku_vllm.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """delta = scaling · b @ a, for a [rank, in] and b [out, rank], laid out as the base weight [out, in] is."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of b @ a: [out, in], or [experts, out, in] of stacked factors."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def transposed(self) -> "LowRank":
        """The delta of the transposed weight."""
        return LowRank(self.b.mT, self.a.mT, self.scaling)


@dataclass(frozen=True, slots=True)
class Dense:
    """delta = the tensor `name` of a file, or the `part` of it at these indices, read when it is needed."""

    reader: CheckpointReader
    name: str
    part: tuple[int | slice, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta, which is that of the base weight."""
        return tuple(self.mapped().shape) if self.part else self.reader.info(self.name).shape

    def tensor(self) -> "torch.Tensor":
        """Read the tensor into new memory."""
        return self.mapped().clone() if self.part else self.reader.tensor(self.name)

    def mapped(self) -> "torch.Tensor":
        """The tensor as a view of the memory-mapped file, without copying it."""
        return self.reader.mapped(self.name)[self.part] if self.part else self.reader.mapped(self.name)

    def of(self, *part: int | slice) -> "Dense":
        """The part of the whole tensor at these indices."""
        return Dense(self.reader, self.name, part)


@dataclass(frozen=True, slots=True)
class Held:
    """delta = a tensor in memory: what a conversion of transformers that has no simpler form makes of a delta."""

    values: "torch.Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta, which is that of the base weight."""
        return tuple(self.values.shape)

    def mapped(self) -> "torch.Tensor":
        """The tensor."""
        return self.values


Delta = LowRank | Dense | Held


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: the leading dimensions multiplied, and the last.

    A vector is one column, so that it can be cut between any two elements.
    """
    if len(shape) <= 1:
        return (shape[0] if shape else 1), 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]
