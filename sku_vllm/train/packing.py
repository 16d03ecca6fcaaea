"""Lay rows out for one forward pass: without padding, and with the tokens that several rows begin with only once.

Under a causal mask a token's state depends on the tokens before it alone, so rows that begin with the same tokens share their states: a
harmful prompt with its own and five other answers costs one prompt and six answers. Only
attention spreads every row out, padded (packed_attention.py). Open this file to change how rows are laid out or grouped into passes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sku_vllm.decoding.prefix import common_prefix
from sku_vllm.methods.method import Side

if TYPE_CHECKING:
    import torch

# Rows of at least this share of a block's longest row join that block, which is one attention call; shorter ones begin another.
SIMILAR = 0.7


@dataclass(frozen=True, slots=True)
class Pack:
    """T different tokens of some rows, and the right-padded blocks of N places in which attention sees every row whole.

    Attributes:
        ids: token ids, [1, T]. positions: each token's place in its row, [1, T].
        rows: for every row, in the order given, the index of each of its tokens.
        blocks: (rows, longest) of each block of similar rows; their places follow one another.
        source: the token at each of the N places; padding places hold token 0, and no row attends to them.
        place: the place at which each token's result is read, [T].
        again: a token that several rows share (first row) and another place of it (second row), for each further place, [2, …].
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


def pack_rows(rows: Sequence[Sequence[int]], sides: Sequence[Side]) -> Pack:
    """Lay out rows of token ids; rows on different sides share nothing, since their states differ."""
    import torch

    known: dict[tuple[Side, int, int], int] = {}  # (side, token before or −1, id) → token
    ids: list[int] = []
    positions: list[int] = []
    indices = []
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


def split_by_prefix(rows: Sequence[Sequence[int]], sides: Sequence[Side], limit: int) -> list[list[int]]:
    """Row numbers in groups of at most `limit` tokens for rows that will be packed: rows that begin with the same tokens lie together,
    and the tokens they share count once."""
    order = sorted(range(len(rows)), key=lambda row: (sides[row], list(rows[row])))
    fresh = [len(row) for row in rows]
    for before, row in zip(order, order[1:], strict=False):
        if sides[before] == sides[row]:
            fresh[row] -= len(common_prefix([rows[before], rows[row]]))
    return _fill(order, [len(row) for row in rows], fresh, limit)


def _fill(order: Sequence[int], whole: Sequence[int], fresh: Sequence[int], limit: int) -> list[list[int]]:
    """Groups of row numbers in this order, of at most `limit` tokens each.

    The first row of a group counts with all its tokens (`whole`), every other row with those that it does not share with the row before it
    (`fresh`). There are as few groups as the limit allows, of about equal size: the largest decides memory, and small ones are slow.
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
