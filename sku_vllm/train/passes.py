"""Divide the rows of one step into forward passes, on one process or on several.

Open this file to see what a pass holds and in which order passes run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.data import Encoded
from sku_vllm.methods.method import Side, Term
from sku_vllm.train.objective import Piece, inputs, pieces_of
from sku_vllm.train.packing import split_by_prefix, split_by_tokens

Rows = Mapping[str, Sequence[Encoded]]
"""Rows of each kind that a step's terms ask for (`method.RowKind`)."""


def split_into_passes(terms: Sequence[Term], rows: Rows, limit: int, *, packed: bool) -> list[list[Piece]]:
    """The pieces of each forward pass of a step, at most `limit` tokens a pass.

    Rows on Side.ATTACKED get passes of their own, since the weights are exchanged for these. Without packing every side does.
    """
    pieces = pieces_of(terms, rows)
    separate = [piece.side if not packed or piece.side is Side.ATTACKED else None for piece in pieces]
    groups = [[piece for piece, side in zip(pieces, separate, strict=True) if side is wanted] for wanted in (None, *Side)]
    return [[group[number] for number in numbers] for group in groups for numbers in _split(group, limit, packed)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward pass of one process, run at the same time as one of every other process.

    Attributes:
        pieces: what the pass computes.
        attacked: whether it runs on the weights that the adversary has fine-tuned.
        counts: False for a repeated pass, whose losses are dropped. A process without passes left runs one only because, with FSDP2, all
            processes have to gather weights together.
    """

    pieces: list[Piece]
    attacked: bool
    counts: bool


def in_step(mine: Sequence[list[Piece]], everyone: Sequence[Sequence[list[Piece]]]) -> list[Turn]:
    """One process's passes, filled up so that every process takes as many: first on the plain weights, then on attacked ones.

    With sharded weights (FSDP2) all processes gather together, so each has to run the same kind of pass at the same time.

    Args:
        mine: this process's passes. everyone: those of all processes, this one included.
    """
    turns = []
    for attacked in (False, True):
        own = [pieces for pieces in mine if _attacked(pieces) == attacked]
        count = max(sum(_attacked(pieces) == attacked for pieces in passes) for passes in everyone)
        turns += [Turn(own[number] if number < len(own) else mine[0], attacked, number < len(own)) for number in range(count)]
    return turns


def _attacked(pieces: Sequence[Piece]) -> bool:
    return pieces[0].side is Side.ATTACKED


def _split(pieces: Sequence[Piece], limit: int, packed: bool) -> list[list[int]]:
    rows = [inputs(piece.row) for piece in pieces]
    return split_by_prefix(rows, [piece.side for piece in pieces], limit) if packed else split_by_tokens(list(map(len, rows)), limit)


def rows_of_process(rows: Rows, rank: int, world: int) -> Rows:
    """The rows of process `rank` of `world`: a contiguous part of each kind.

    Contiguous because rows of one prompt follow one another, and in one process packing computes their prompt once.
    """
    return {kind: some[len(some) * rank // world : len(some) * (rank + 1) // world] for kind, some in rows.items()}


def forward_tokens(terms: Sequence[Term], rows: Rows) -> int:
    """Forward tokens, without what packing saves: each row once for each side, and once more for every reference."""
    length = {kind: sum(len(inputs(row)) for row in some) for kind, some in rows.items()}
    seen = {(term.rows, term.side) for term in terms}
    references = {(term.rows, term.side, side) for term in terms for side in term.references}
    return sum(length[kind] for kind, _ in seen) + sum(length[kind] for kind, _, _ in references)
