"""Verdicts on one version of an arm, counted by bucket of the sticky key. Tallies of processes, replicas and restarts add up."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from sku_vllm.judges import LABELS, Verdict
from sku_vllm.stats.clustered import BUCKETS, Counts

UNDECIDED = "undecided"  # counted beside its label: an answer whose harm the judge did not decide
COUNTED = (*LABELS, UNDECIDED)


class Tally:
    """{label: verdicts in each bucket}. A verdict is counted under its label, and as `UNDECIDED` too where harm is not decided."""

    def __init__(self) -> None:
        self.labels: dict[str, list[int]] = {}

    def add(self, verdict: Verdict, bucket: int) -> None:
        """Count one verdict."""
        for name in names_of(verdict):
            self.labels.setdefault(name, [0] * BUCKETS)[bucket] += 1

    def __add__(self, other: "Tally") -> "Tally":
        both = Tally()
        for name in dict.fromkeys([*self.labels, *other.labels]):
            both.labels[name] = [one + two for one, two in zip(self.by_bucket(name), other.by_bucket(name), strict=True)]
        return both

    def by_bucket(self, name: str) -> list[int]:
        """Verdicts in each bucket; name: a label, `UNDECIDED`, or `judged` and `known`, which add labels up."""
        if name == "known":
            return [all_ - open_ for all_, open_ in zip(self.by_bucket("judged"), self.by_bucket(UNDECIDED), strict=True)]
        if name == "judged":
            return [sum(each) for each in zip(*(self.by_bucket(label) for label in LABELS), strict=True)]
        return self.labels.get(name, [0] * BUCKETS)

    def counts(self, name: str) -> Counts:
        """What is tested: `harmful` among those whose harm was decided, or another label among all."""
        sizes = np.asarray(self.by_bucket("known" if name == "harmful" else "judged"), float)
        return Counts.of(np.minimum(self.by_bucket(name), sizes), sizes)

    def totals(self) -> Counter[str]:
        """Verdicts over all buckets: judged, known, and each label."""
        return Counter({name: sum(self.by_bucket(name)) for name in ("judged", "known", *LABELS)})

    def to_json(self) -> dict[str, list[int]]:
        """{label: verdicts in each bucket}."""
        return {name: list(counts) for name, counts in self.labels.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Tally":
        """The tally that `to_json` has written. Raises ValueError for anything else."""
        tally = cls()
        for name, counts in value.items():
            if name not in COUNTED or len(counts) != BUCKETS or not all(isinstance(each, int) and each >= 0 for each in counts):
                raise ValueError(f"{name!r}: not verdicts of {BUCKETS} buckets")
            tally.labels[name] = list(counts)
        return tally


def names_of(verdict: Verdict) -> list[str]:
    """What a verdict is counted under: its label, and `UNDECIDED` where the judge did not decide harm."""
    return [verdict.label, *([UNDECIDED] if verdict.harmful is None else [])]
