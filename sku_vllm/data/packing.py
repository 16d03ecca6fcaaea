"""Rows in one forward pass: no padding, and what rows begin with alike is there once.

Under a causal mask a token's state depends on what comes before it alone, so rows that begin alike share those tokens: a harmful
prompt with its own and five other answers costs one prompt and six answers. Attention alone sees the rows whole and padded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows at least this long, relative to the longest beside them, share one attention call; shorter ones get a call of their own.
SIMILAR = 0.7


@dataclass(frozen=True, slots=True)
class Pack:
    """T different tokens of some rows, and the right-padded blocks of N places in which attention sees every row whole.

    Attributes:
        ids: token ids, [1, T]. positions: each token's place in its row, [1, T].
        rows: for every row, in the order given, the index of each of its tokens.
        blocks: (rows, longest) of each block of similar rows; their places follow one another.
        source: the token at each of the N places; padding repeats some token, which no other ever attends to.
        place: the place at which each token's result is read, [T].
        again: tokens that more rows than one have, and their further places, [2, …].
    """

    ids: "torch.Tensor"
    positions: "torch.Tensor"
    rows: list[list[int]]
    blocks: list[tuple[int, int]] = field(repr=False)
    source: "torch.Tensor" = field(repr=False)
    place: "torch.Tensor" = field(repr=False)
    again: "torch.Tensor" = field(repr=False)

    def to(self, device: "torch.device | str") -> "Pack":
        """The same pack on another device."""
        tensors = (tensor.to(device) for tensor in (self.source, self.place, self.again))
        return Pack(self.ids.to(device), self.positions.to(device), self.rows, self.blocks, *tensors)


def pack_rows(rows: Sequence[Sequence[int]], sides: Sequence[int]) -> Pack:
    """Lay out rows of token ids; rows on different sides share nothing."""
    import torch

    known: dict[tuple[int, int, int], int] = {}  # (side, token before or −1, id) → token
    ids, positions, indices = [], [], []
    for row, side in zip(rows, sides, strict=True):
        at, mine = -1, []
        for depth, token in enumerate(row):
            new = len(ids)
            at = known.setdefault((side, at, token), new)
            if at == new:
                ids.append(token)
                positions.append(depth)
            mine.append(at)
        indices.append(mine)
    return Pack(torch.tensor([ids]), torch.tensor([positions]), indices, *_layout(indices, len(ids)))


def _layout(indices: Sequence[list[int]], tokens: int) -> tuple[list[tuple[int, int]], "torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Blocks, source, place and again of a pack."""
    import torch

    order = sorted(range(len(indices)), key=lambda row: -len(indices[row]))
    blocks: list[tuple[int, int]] = []
    source: list[int] = []
    place, again = [-1] * tokens, []
    for row in order:
        mine = indices[row]
        count, longest = blocks[-1] if blocks else (0, 0)
        if count and len(mine) >= SIMILAR * longest:
            blocks[-1] = (count + 1, longest)
        else:
            blocks.append((1, longest := len(mine)))
        for at, token in enumerate(mine, len(source)):
            if place[token] < 0:
                place[token] = at
            else:
                again.append((token, at))
        source += mine + [0] * (longest - len(mine))
    return blocks, torch.tensor(source), torch.tensor(place), torch.tensor(again, dtype=torch.long).view(-1, 2).T.contiguous()


def split_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers in groups of at most `limit` tokens (a longer row stands alone), similar lengths together."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return _fill(order, lengths, lengths, limit)


def split_by_prefix(rows: Sequence[Sequence[int]], sides: Sequence[int], limit: int) -> list[list[int]]:
    """The same for rows that will be packed: those that begin alike lie together, and what they share counts once."""
    order = sorted(range(len(rows)), key=lambda row: (sides[row], list(rows[row])))
    fresh = [len(row) for row in rows]
    for before, row in zip(order, order[1:], strict=False):
        if sides[before] == sides[row]:
            fresh[row] -= len(commonprefix([rows[before], rows[row]]))
    return _fill(order, [len(row) for row in rows], fresh, limit)


def _fill(order: Sequence[int], whole: Sequence[int], fresh: Sequence[int], limit: int) -> list[list[int]]:
    """Groups in this order: the first of a group counts whole, the others what is fresh in them.

    As few groups as the limit allows, about equally large: the largest decides memory, and products over few tokens are slow.
    """
    groups: list[list[int]] = []
    tokens = sum(fresh)
    each = tokens / max(1, math.ceil(tokens / limit))
    filled = done = 0
    for row in order:
        if not groups or filled + fresh[row] > limit or done + fresh[row] / 2 > each * len(groups):
            groups.append([])
            filled = whole[row] - fresh[row]
        groups[-1].append(row)
        filled += fresh[row]
        done += fresh[row]
    return groups
