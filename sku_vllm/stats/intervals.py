"""Intervals for a share: Wilson's, and Wilson's with the design effect of clustered samples."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(k: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) for k of n; (0, 1) for n = 0. For 0 of 128 the upper end is 0.0291."""
    if n <= 0:
        return 0.0, 1.0
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-19.
    return 0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half)


def clustered_wilson(successes: Sequence[int], sizes: Sequence[int], z: float = Z95) -> tuple[float, float]:
    """Wilson's interval at the effective sample size n / deff, for `sizes[i]` samples of cluster i with `successes[i]` hits.

    deff = var(ratio estimator over clusters) / (p (1 - p) / n), limited to the range from 1 to the size-weighted mean cluster
    size, which holds when all samples of a cluster are equal. Where p is 0 or 1 the variance says nothing about clustering, so
    the largest deff is used; for clusters of equal size the effective sample size is then the number of clusters. (Kish 1965;
    Korn and Graubard 1998.)

    All counts are first divided by their greatest common divisor, so that repeating every sample changes nothing: a copy is no news.
    """
    clusters = [(k, size) for k, size in zip(successes, sizes, strict=True) if size > 0]
    n = sum(size for _, size in clusters)
    if n == 0:
        return 0.0, 1.0
    k = sum(hits for hits, _ in clusters)
    copies = math.gcd(*(count for cluster in clusters for count in cluster))
    worst = sum(size * size for _, size in clusters) / n
    if k in (0, n) or len(clusters) < 2:
        deff = worst
    else:
        # Integers, as exact sums do not depend on the order of the clusters: n² · Σ (hits − p size)².
        squares = sum((n * hits - k * size) ** 2 for hits, size in clusters)
        deff = min(max(float(copies), squares * len(clusters) / ((len(clusters) - 1) * n * k * (n - k))), worst)
    return wilson(k / deff, n / deff, z)
