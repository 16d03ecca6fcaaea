"""Several judges over the same answers: strict on harm, and open about where they disagree."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from sku_vllm.judges.exchange import Exchange, Judge


class AllOf:
    """Harmful when any of the judges says so. `votes` and `agreement` show who said what."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges = tuple(judges)
        self.name = "all:" + ",".join(judge.name for judge in judges)

    def votes(self, exchanges: Sequence[Exchange]) -> dict[str, list[bool | None]]:
        """Every judge's verdicts by its name."""
        return {judge.name: judge.judge(exchanges) for judge in self.judges}

    def judge(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        return strictest(self.votes(exchanges))


def strictest(votes: dict[str, list[bool | None]]) -> list[bool | None]:
    """True where any judge says harmful, None where none has an opinion, else False."""
    return [True if True in row else False if False in row else None for row in zip(*votes.values(), strict=True)]


def agreement(votes: dict[str, list[bool | None]]) -> list[dict[str, Any]]:
    """For every pair of judges: rows both judged, share that agrees, Cohen's kappa, and the numbers of the rows in dispute.

    A pair with a judge that has no opinion on harm is left out; kappa is None where chance alone would always agree (one class only).
    """
    pairs = []
    for (first, one), (second, other) in combinations(votes.items(), 2):
        both = [(row, a, b) for row, (a, b) in enumerate(zip(one, other, strict=True)) if a is not None and b is not None]
        disputed = [row for row, a, b in both if a != b]
        n = len(both)
        if n == 0:
            continue  # one of them has no opinion on harm
        agree = 1 - len(disputed) / n
        p, q = sum(a for _, a, _ in both) / n, sum(b for _, _, b in both) / n
        chance = p * q + (1 - p) * (1 - q)
        kappa = (agree - chance) / (1 - chance) if chance < 1 else None
        pairs.append({"judges": [first, second], "n": n, "agreement": agree, "kappa": kappa, "disagreements": disputed})
    return pairs
