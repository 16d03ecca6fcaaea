"""How a step's rows become forward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.data import Encoded
from sku_vllm.data.packing import split_by_prefix, split_by_tokens
from sku_vllm.methods.forward import RELEARNED
from sku_vllm.methods.method import Term
from sku_vllm.methods.objective import Piece, inputs, pieces_of

Rows = Mapping[str, Sequence[Encoded]]


def plan(terms: Sequence[Term], rows: Rows, limit: int, *, packed: bool) -> list[list[Piece]]:
    """The rows in passes of at most `limit` tokens; attacked weights have passes of their own, and so has each side without packing."""
    pieces = pieces_of(terms, rows)
    kinds = [piece.side == RELEARNED if packed else piece.side for piece in pieces]
    groups = [[piece for piece, kind in zip(pieces, kinds, strict=True) if kind == wanted] for wanted in sorted(set(kinds))]
    return [[group[number] for number in numbers] for group in groups for numbers in _split(group, limit, packed)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of one process. `attacked`: on an adversary's weights. `counts`: False where it only keeps company."""

    pieces: list[Piece]
    attacked: bool
    counts: bool


def in_step(mine: Sequence[list[Piece]], everyone: Sequence[Sequence[list[Piece]]]) -> list[Turn]:
    """One process's passes such that all of `everyone` have as many on the plain weights and as many on attacked ones, in that order:
    processes that gather weights together gather the same ones."""
    turns = []
    for attacked in (False, True):
        own = [pieces for pieces in mine if _attacked(pieces) == attacked]
        count = max(sum(_attacked(pieces) == attacked for pieces in passes) for passes in everyone)
        turns += [Turn(own[number] if number < len(own) else mine[0], attacked, number < len(own)) for number in range(count)]
    return turns


def _attacked(pieces: Sequence[Piece]) -> bool:
    return pieces[0].side == RELEARNED


def _split(pieces: Sequence[Piece], limit: int, packed: bool) -> list[list[int]]:
    rows = [inputs(piece.row) for piece in pieces]
    return split_by_prefix(rows, [piece.side for piece in pieces], limit) if packed else split_by_tokens(list(map(len, rows)), limit)


def share(rows: Rows, rank: int, world: int) -> Rows:
    """One process's rows: neighbours of every kind, since rows of one prompt are, and share its tokens."""
    return {kind: some[len(some) * rank // world:len(some) * (rank + 1) // world] for kind, some in rows.items()}


def forward_tokens(terms: Sequence[Term], rows: Rows) -> int:
    """Tokens that go forward when no row shares any: once a side, once more for every reference."""
    length = {kind: sum(len(inputs(row)) for row in some) for kind, some in rows.items()}
    seen = {(term.rows, term.side) for term in terms}
    references = {(term.rows, term.side, name) for term in terms for name in term.references}
    return sum(length[kind] for kind, _ in seen) + sum(length[kind] for kind, _, _ in references)
