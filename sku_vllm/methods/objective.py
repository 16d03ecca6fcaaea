"""The terms of one step over the rows of one pass."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from sku_vllm.data import Encoded
from sku_vllm.methods.chunked import per_token
from sku_vllm.methods.forward import Forward
from sku_vllm.methods.method import Term

T = TypeVar("T")
States = tuple[torch.Tensor, dict[int, list[int]]]  # hidden states [tokens, d] of chosen pieces, and which of them are each piece's
References = Mapping[str, States | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One row in one forward pass: its kind, and the side of the base it is seen from."""

    row: Encoded
    kind: str
    side: int


def counted(term: Term, row: Encoded) -> range:
    """Which of the row's tokens a term counts, as places of the tokens that are predicted."""
    begin, end = row.answer_start, len(row.ids)
    return {
        "answer": range(begin, end), "all": range(1, end), "first": range(begin, min(begin + 1, end)), "later": range(begin + 1, end)
    }[term.tokens]


def inputs(row: Encoded) -> list[int]:
    """The tokens that go through the model: all but the last, after which nothing is predicted."""
    return row.ids[:-1] or row.ids


def total(term: Term, rows: Sequence[Encoded]) -> int:
    """What a term's mean divides by: tokens, or rows that have any."""
    counts = [len(counted(term, row)) for row in rows]
    by_rows = term.mean == "rows" or term.sequence is not None
    return max(1, sum(count > 0 for count in counts) if by_rows else sum(counts))


class Objective(torch.nn.Module):
    """Pieces in, every term's share of its mean out. One module, so that DDP and FSDP see one forward pass."""

    def __init__(self, forward: Forward, train_head: bool = False) -> None:
        super().__init__()
        self.passes = forward
        self.train_head = train_head
        self.alike = False  # every pass runs every reference, as processes that gather weights together need
        self._no_split_modules = forward.core._no_split_modules  # what FSDP makes its units of

    def forward(
        self,
        pieces: Sequence[Piece],
        terms: Sequence[Term],
        totals: Mapping[str, int],
        references: References,
        head: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sum over these pieces of each term, divided by its total over the whole step; weights are not applied.

        `references` are of the same pieces, and `head` the output layer's weights for them where an adversary's are in place.
        """
        hidden, rows = self.passes([inputs(piece.row) for piece in pieces], [piece.side for piece in pieces])
        values = {}
        for term in terms:
            mine = [number for number, piece in enumerate(pieces) if piece.kind == term.rows and piece.side == term.side]
            mine = [number for number in mine if len(counted(term, pieces[number].row))]
            if mine:
                values[term.name] = self._term(term, pieces, mine, (hidden, rows), references, head) / totals[term.name]
        return values

    def gathered(self, call: Callable[[], T]) -> T:
        """What `call` gives, run as a forward pass is: processes that keep shards gather the weights for it together."""
        return call()

    @torch.no_grad()
    def references(self, pieces: Sequence[Piece], terms: Sequence[Term]) -> References:
        """What terms compare these pieces with: the base with the adapter off, and the adapted side; nobody attacks either."""
        return {name: self._reference(name, pieces, terms) for name in ("base", "adapted")}

    def _reference(self, name: str, pieces: Sequence[Piece], terms: Sequence[Term]) -> States | None:
        """Hidden states of the pieces some term compares with `name`, and which of them are each piece's."""
        wanted = {(term.rows, term.side) for term in terms if name in term.references}
        chosen = [number for number, piece in enumerate(pieces) if (piece.kind, piece.side) in wanted]
        if not chosen and self.alike and any(name in term.references for term in terms):
            chosen = [0]
        if not chosen:
            return None
        with self.passes.reference_adapter(name == "adapted"):
            hidden, rows = self.passes([inputs(pieces[number].row) for number in chosen], [int(name == "adapted")] * len(chosen))
        return hidden, dict(zip(chosen, rows, strict=True))

    def _term(
        self,
        term: Term,
        pieces: Sequence[Piece],
        mine: list[int],
        states: tuple[torch.Tensor, list[list[int]]],
        references: References,
        head: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        hidden, rows = states
        spans = [counted(term, pieces[number].row) for number in mine]
        targets = torch.tensor(
            [pieces[number].row.ids[at] for number, span in zip(mine, spans, strict=True) for at in span], device=hidden.device
        )
        others = []
        for name in term.references:
            states_there, rows_there = references[name]
            there = partial(self.passes.head, base=name == "base", weights=head)
            others.append((there, states_there.index_select(0, _places(mine, spans, rows_there, hidden.device))))
        values = per_token(
            term.loss, self.passes.head, hidden.index_select(0, _places(mine, spans, rows, hidden.device)), targets, others,
            vocabulary=self.passes.vocabulary, train_head=self.train_head,
        )
        if term.mean == "tokens" and term.sequence is None:
            return values.sum()
        lengths = torch.tensor([len(span) for span in spans], device=hidden.device)
        owners = torch.repeat_interleave(torch.arange(len(mine), device=hidden.device), lengths)
        sums = values.new_zeros(len(mine)).index_add(0, owners, values)
        return term.sequence(sums).sum() if term.sequence else (sums / lengths).sum()

    @contextmanager
    def training_head(self) -> Iterator[None]:
        """Inside, the head gets gradients."""
        before, self.train_head = self.train_head, True
        try:
            yield
        finally:
            self.train_head = before



def _places(mine: list[int], spans: list[range], rows: Mapping[int, list[int]] | list[list[int]], device: torch.device) -> torch.Tensor:
    """Where the hidden states lie that predict the counted tokens: one before each."""
    return torch.tensor([rows[number][at - 1] for number, span in zip(mine, spans, strict=True) for at in span], device=device)


def pieces_of(terms: Sequence[Term], rows: Mapping[str, Sequence[Encoded]]) -> list[Piece]:
    """Every row once for each side some term sees it from."""
    sides = defaultdict(set)
    for term in terms:
        sides[term.rows].add(term.side)
    return [Piece(row, kind, side) for kind, wanted in sides.items() for side in sorted(wanted) for row in rows[kind]]
