"""Compute the losses of a method's terms over the rows of one forward pass.

Open this file to see which tokens a term counts and how its mean is taken.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from sku_vllm.data import Encoded
from sku_vllm.methods.method import Side, Term
from sku_vllm.train.chunked_loss import per_token, wide
from sku_vllm.train.forward import Forward

T = TypeVar("T")
States = tuple[torch.Tensor, Mapping[int, list[int]]]
"""Hidden states [tokens, d] of some pieces, and number of each such piece → indices of its tokens' states."""
References = Mapping[tuple[Side, float | None], States]
"""The states of frozen models that terms compare with, by side and depth (`Term.depth`)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One row in one forward pass.

    Attributes:
        row: its tokens. kind: what the row is, see `method.RowKind`. side: the model that computes it.
    """

    row: Encoded
    kind: str
    side: Side


def counted(term: Term, row: Encoded) -> range:
    """Places in the row of the predicted tokens that a term counts; place 0 is never predicted."""
    begin, end = row.answer_start, len(row.ids)
    return {
        "answer": range(begin, end),
        "all": range(1, end),
        "first": range(begin, min(begin + 1, end)),
        "later": range(begin + 1, end),
        "last": range(max(begin, end - 1), end),
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
    """Pieces in, every term's share of its mean out. One module, so that DDP and FSDP see one forward pass.

    Attributes:
        passes: computes the hidden states. train_head: whether the output layer gets gradients.
        alike: run every reference in every pass, since with FSDP2 all processes have to gather weights at the same time.
    """

    def __init__(self, forward: Forward, train_head: bool = False) -> None:
        super().__init__()
        self.passes = forward
        self.train_head = train_head
        self.alike = False
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

        `references`: the result of `self.references` for the same pieces. `head`: output-layer weights for their
        logits, if not the model's own.
        """
        rows, sides = [inputs(piece.row) for piece in pieces], [piece.side for piece in pieces]
        passed = {depth: self.passes(rows, sides, depth) for depth in _depths(terms)}  # in practice one: no method has terms of both kinds
        values = {}
        for term in terms:
            mine = [number for number, piece in enumerate(pieces) if piece.kind == term.rows and piece.side == term.side]
            mine = [number for number in mine if len(counted(term, pieces[number].row))]
            if mine:
                hidden, places = passed[term.depth]
                states = hidden, dict(enumerate(places))
                values[term.name] = self._term(term, pieces, mine, states, references, head) / totals[term.name]
        return values

    def gathered(self, call: Callable[[], T]) -> T:
        """Run `call` as FSDP2 runs a forward pass: all processes gather the sharded weights for it."""
        return call()

    @torch.no_grad()
    def references(self, pieces: Sequence[Piece], terms: Sequence[Term]) -> References:
        """States of the models that terms compare these pieces with, Side.BASE and Side.ADAPTED, both on plain weights."""
        keys = [(side, depth) for side in (Side.BASE, Side.ADAPTED) for depth in _depths(terms)]
        found = {key: self._reference(*key, pieces, [term for term in terms if term.depth == key[1]]) for key in keys}
        return {key: states for key, states in found.items() if states is not None}

    def _reference(self, side: Side, depth: float | None, pieces: Sequence[Piece], terms: Sequence[Term]) -> States | None:
        """States, at that depth, of the pieces that some term compares with `side`; None where there are none."""
        wanted = {(term.rows, term.side) for term in terms if side in term.references}
        chosen = [number for number, piece in enumerate(pieces) if (piece.kind, piece.side) in wanted]
        if not chosen and self.alike and any(side in term.references for term in terms):
            chosen = [0]
        if not chosen:
            return None
        with self.passes.reference_adapter(side is Side.ADAPTED):
            hidden, rows = self.passes([inputs(pieces[number].row) for number in chosen], [side] * len(chosen), depth)
        return hidden, dict(zip(chosen, rows, strict=True))

    def _term(
        self,
        term: Term,
        pieces: Sequence[Piece],
        mine: list[int],
        states: States,
        references: References,
        head: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """One term's sum over its pieces, whose numbers are `mine`."""
        hidden, rows = states
        spans = [counted(term, pieces[number].row) for number in mine]
        targets = torch.tensor(
            [pieces[number].row.ids[at] for number, span in zip(mine, spans, strict=True) for at in span], device=hidden.device
        )
        others = []
        for side in term.references:
            states_there, rows_there = references[side, term.depth]
            there = partial(self.passes.head, base=side is Side.BASE, weights=head)
            others.append((there, states_there.index_select(0, _places(mine, spans, rows_there, hidden.device))))
        own = hidden.index_select(0, _places(mine, spans, rows, hidden.device))
        if term.depth is not None:
            values = term.loss(wide(own), targets, *(wide(known) for _, known in others))
        else:
            vocabulary = self.passes.vocabulary
            values = per_token(term.loss, self.passes.head, own, targets, others, vocabulary=vocabulary, train_head=self.train_head)
        if term.mean == "tokens" and term.sequence is None:
            return values.sum()
        lengths = torch.tensor([len(span) for span in spans], device=hidden.device)
        owners = torch.repeat_interleave(torch.arange(len(mine), device=hidden.device), lengths)
        sums = values.new_zeros(len(mine)).index_add(0, owners, values)
        if term.sequence is None:
            return (sums / lengths).sum()
        return term.sequence(sums / lengths if term.per_length else sums).sum()

    @contextmanager
    def training_head(self) -> Iterator[None]:
        """Inside, the head gets gradients."""
        before, self.train_head = self.train_head, True
        try:
            yield
        finally:
            self.train_head = before


def _depths(terms: Sequence[Term]) -> list[float | None]:
    """The depths whose hidden states the terms read."""
    return list(dict.fromkeys(term.depth for term in terms))


def _places(mine: list[int], spans: list[range], rows: Mapping[int, list[int]], device: torch.device) -> torch.Tensor:
    """Indices of the hidden states that predict the counted tokens: each is one place before its token."""
    return torch.tensor([rows[number][at - 1] for number, span in zip(mine, spans, strict=True) for at in span], device=device)


def pieces_of(terms: Sequence[Term], rows: Mapping[str, Sequence[Encoded]]) -> list[Piece]:
    """Every row once for each side on which some term needs it."""
    sides: dict[str, set[Side]] = defaultdict(set)
    for term in terms:
        sides[term.rows].add(term.side)
    return [Piece(row, kind, side) for kind, wanted in sides.items() for side in sorted(wanted) for row in rows[kind]]
