"""Rows laid end to end without padding, and the padded view that attention alone needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows at least this long, relative to the longest beside them, share one attention call; shorter ones get a call of their own.
SIMILAR = 0.7


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring rows of a pack seen as a right-padded block: tokens [start, stop) fill `places` of `count` × `length`."""

    start: int
    stop: int
    count: int
    length: int
    places: "torch.Tensor | None"  # None: no padding, the tokens are the block


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows end to end.

    Attributes:
        ids: token ids, [1, T]. positions: each token's place in its own row, [1, T].
        starts: where each row begins, in the order the rows were given.
        buckets: how attention sees them (rows lie sorted by length, so neighbours are similar).
    """

    ids: "torch.Tensor"
    positions: "torch.Tensor"
    starts: list[int]
    lengths: list[int]
    buckets: list[Bucket] = field(repr=False)

    def to(self, device: "torch.device | str") -> "Pack":
        """The same pack on another device."""
        buckets = [
            Bucket(b.start, b.stop, b.count, b.length, None if b.places is None else b.places.to(device)) for b in self.buckets
        ]
        return Pack(self.ids.to(device), self.positions.to(device), self.starts, self.lengths, buckets)


def pack_rows(rows: Sequence[Sequence[int]]) -> Pack:
    """Lay rows of token ids end to end, longest first."""
    import torch

    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    starts, ids, positions, at = [0] * len(rows), [], [], 0
    for row in order:
        starts[row] = at
        ids.extend(rows[row])
        positions.extend(range(len(rows[row])))
        at += len(rows[row])
    lengths = [len(row) for row in rows]
    buckets = _buckets([lengths[row] for row in order])
    return Pack(torch.tensor([ids]), torch.tensor([positions]), starts, lengths, buckets)


def _buckets(lengths: list[int]) -> list[Bucket]:
    import torch

    buckets, at, first = [], 0, 0
    while first < len(lengths):
        longest = lengths[first]
        last = first
        while last < len(lengths) and lengths[last] >= SIMILAR * longest:
            last += 1
        inside = lengths[first:last]
        places = None
        if inside[-1] != longest:
            places = torch.cat([torch.arange(size) + row * longest for row, size in enumerate(inside)])
        buckets.append(Bucket(at, at + sum(inside), len(inside), longest, places))
        at, first = at + sum(inside), last
    return buckets


def split_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers in groups of at most `limit` tokens (a longer row stands alone), similar lengths together."""
    groups: list[list[int]] = []
    filled = limit + 1
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if filled + lengths[row] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += lengths[row]
    return groups
