"""Intervals for a share: Wilson's, and Wilson's with the design effect of clustered samples."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(k: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for k of n (1927); (0, 1) for n = 0. 0 of 128 gives an upper end of 0.0291."""
    if n <= 0:
        return 0.0, 1.0
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-19.
    return 0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half)


def clustered_wilson(successes: Sequence[int], sizes: Sequence[int], z: float = Z95) -> tuple[float, float]:
    """Wilson's interval at the effective sample size n / deff, for `sizes[i]` samples of cluster i with `successes[i]` hits.

    deff = var(ratio estimator over clusters) / (p (1 - p) / n), kept between 1 and the mean cluster size weighted by size
    (all samples of a prompt alike). Where every sample agrees (p is 0 or 1) the data cannot tell the clustering, so the
    cautious end is taken: n_eff = the number of clusters for equal sizes. (Kish 1965; Korn and Graubard 1998.)
    """
    clusters = [(k, size) for k, size in zip(successes, sizes, strict=True) if size > 0]
    n = sum(size for _, size in clusters)
    if n == 0:
        return 0.0, 1.0
    k = sum(hits for hits, _ in clusters)
    p = k / n
    worst = sum(size * size for _, size in clusters) / n
    if p in (0.0, 1.0) or len(clusters) < 2:
        deff = worst
    else:
        spread = sum((hits - p * size) ** 2 for hits, size in clusters) * len(clusters) / (len(clusters) - 1)
        deff = min(max(1.0, spread / (n * p * (1 - p))), worst)
    return wilson(k / deff, n / deff, z)
