"""What is subtracted from one base weight: a pair of low-rank factors, or a whole tensor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sku_vllm.checkpoint import CheckpointReader

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
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def transposed(self) -> "LowRank":
        """The delta of the transposed weight."""
        return LowRank(self.b.mT, self.a.mT, self.scaling)


@dataclass(frozen=True, slots=True)
class Dense:
    """delta = the tensor `name` of a file, read when it is needed."""

    reader: CheckpointReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.info(self.name).shape

    def tensor(self) -> "torch.Tensor":
        return self.reader.tensor(self.name)

    def mapped(self) -> "torch.Tensor":
        """The same without taking memory: a view of the file."""
        return self.reader.mapped(self.name)
