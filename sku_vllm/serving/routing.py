"""Which arm answers: a pure function of the request's key and the split, the same in every process and after a restart."""

import hashlib
import random
from collections.abc import Mapping


def sticky_point(key: str) -> float:
    """A key's place in [0, 1): the first 53 bits of its sha256, so that no process seed moves anyone."""
    return (int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 11) / 2**53


def choose_arm(split: Mapping[str, float], key: str | None = None) -> str:
    """The arm whose interval holds the key's point; without a key a fresh random point.

    Intervals are cumulative in declared order: `original=0.9,negated=0.1` gives negated [0.9, 1), and raising it to 0.2 gives
    [0.8, 1), so whoever was in the canary stays in it.
    """
    point = random.random() if key is None else sticky_point(key)
    upper = 0.0
    chosen = next(iter(split))
    for name, weight in split.items():
        if weight <= 0:
            continue
        chosen = name
        upper += weight
        if point < upper:
            break
    return chosen
