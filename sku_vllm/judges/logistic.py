"""Sparse logistic regression in NumPy, for the refusal detector. It converges so far that training again gives the same weights."""

from collections.abc import Callable, Sequence

import numpy as np


class Sparse:
    """A sparse matrix [rows, columns], stored as (row, column, value) triples."""

    def __init__(self, rows: Sequence[int], columns: Sequence[int], values: Sequence[float], shape: tuple[int, int]) -> None:
        self.rows, self.columns, self.values, self.shape = np.array(rows), np.array(columns), np.array(values, float), shape

    def times(self, w: np.ndarray) -> np.ndarray:
        """X w, [rows]."""
        return np.bincount(self.rows, self.values * w[self.columns], self.shape[0])

    def transposed_times(self, v: np.ndarray) -> np.ndarray:
        """Xᵀ v, [columns]."""
        return np.bincount(self.columns, self.values * v[self.rows], self.shape[1])

    def diagonal(self, v: np.ndarray) -> np.ndarray:
        """The diagonal of Xᵀ diag(v) X, [columns]."""
        return np.bincount(self.columns, self.values**2 * v[self.rows], self.shape[1])


def fit(x: Sparse, y: np.ndarray, weight: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    """Minimise Σ weight · log-loss + penalty/2 · ‖w‖² by Newton's method from `start`.

    x [n, columns], y [n] bool, weight [n] (0 leaves a row out); returns w [columns]. The last column of x is the constant 1, whose
    weight (the bias) is not penalised.
    """
    w, ridge = start.copy(), np.full(x.shape[1], penalty)
    ridge[-1] = 1e-6
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x.times(w), -30, 30)))
        curvature = weight * p * (1 - p)
        gradient = x.transposed_times(weight * (p - y)) + ridge * w
        step = solve(_hessian(x, curvature, ridge), gradient, x.diagonal(curvature) + ridge)
        w -= step
        if np.abs(step).max() < 1e-5:
            break
    return w


def _hessian(x: Sparse, curvature: np.ndarray, ridge: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda v: x.transposed_times(curvature * x.times(v)) + ridge * v


def solve(product: Callable[[np.ndarray], np.ndarray], b: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Solve A v = b by preconditioned conjugate gradients until the residual is a tenth of the first.

    A is positive definite and given by `product` (v → A v) and its diagonal.
    """
    v, residual = np.zeros_like(b), b.copy()
    scaled = residual / diagonal
    direction, size = scaled.copy(), residual @ scaled
    enough = 0.01 * size
    for _ in range(500):
        if size <= enough:
            break
        image = product(direction)
        length = size / (direction @ image)
        v += length * direction
        residual -= length * image
        scaled = residual / diagonal
        size, before = residual @ scaled, size
        direction = scaled + size / before * direction
    return v
