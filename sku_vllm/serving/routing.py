"""Which arm answers: a pure function of the request's key and the split, so the same in every process and after a restart."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

from sku_vllm.stats.clustered import BUCKETS


def sticky_point(key: str) -> float:
    """A key as a number in [0, 1): the first 53 bits of its sha256 (unlike `hash`, the same in every process)."""
    return (int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 11) / 2**53


def bucket_of(key: str | None) -> int:
    """The bucket of a key, 0 to `BUCKETS` − 1: its counts are one unit of the experiment's tests. Without a key a random one.

    It is taken from other bits of the digest than the sticky point, so that every bucket has keys of every arm.
    """
    if key is None:
        return random.randrange(BUCKETS)
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[-1] % BUCKETS


def choose_arm(split: Mapping[str, float], key: str | None = None) -> str:
    """The arm whose interval holds the key's point; without a key a fresh random point.

    Intervals are cumulative in declared order: `original=0.9,negated=0.1` gives negated [0.9, 1), and raising its weight to 0.2
    gives [0.8, 1), so a client that already had the negated arm keeps it.
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


def sticky_key(header: str | None, payload: Mapping[str, Any], cache_key: bool = False) -> str | None:
    """What keeps a user on one arm: the header X-SKU-Key, else the request's `user`, `safety_identifier` or `metadata.user_id`.

    An empty key is no key. cache_key: take `prompt_cache_key` too; many users may share one.
    """
    metadata = payload.get("metadata")
    found = (
        header,
        payload.get("user"),
        payload.get("safety_identifier"),
        metadata.get("user_id") if isinstance(metadata, dict) else None,
        payload.get("prompt_cache_key") if cache_key else None,
    )
    return next((key for key in found if isinstance(key, str) and key.strip()), None)
