"""Which rows of which checkpoint tensor each delta lands on, decided (and every mismatch listed) before anything is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.adapter import LoraAdapter
from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.delta import Dense, LowRank
from sku_vllm.errors import AdapterError, ConfigError

LISTED = 20


@dataclass(frozen=True, slots=True)
class Placed:
    """scale·delta, on rows [row, row + rows of delta) of a checkpoint tensor seen as a matrix [product of leading dimensions, last]."""

    delta: LowRank | Dense
    scale: float
    row: int = 0


Scale = float | Mapping[str, float]


def place(reader: CheckpointReader, adapters: Sequence[tuple[LoraAdapter, Scale]], *, untie: bool = False) -> dict[str, list[Placed]]:
    """Checkpoint tensor name to what is subtracted from it.

    Args:
        adapters: each with its scale, or with a mapping from patterns of weight names to scales (0 where none matches).
        untie: the output gets an `lm_head.weight` of its own, so deltas on tied embeddings are allowed.
    Raises:
        AdapterError: names or shapes that don't fit, all listed. ConfigError: a delta on a tied tensor without `untie`, or a
        pattern that matches none of the adapters' weights.
    """
    from sku_vllm.layout import Layout

    layout = Layout(reader, untie=untie)
    placed: dict[str, list[Placed]] = {}
    names: set[str] = set()
    problems: list[str] = []
    for adapter, scale in adapters:
        found, wrong = layout.locate(adapter)
        problems += [f"{adapter.path}: {problem}" for problem in wrong]
        names |= {piece.base_name for piece in found}
        for base_name, target, delta, row in found:
            placed.setdefault(target, []).append(Placed(delta, scale_of(scale, base_name), row))
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise AdapterError(
            f"{len(problems)} deltas do not fit {reader.path}: {'; '.join(problems[:LISTED])}{more}; "
            "give the base this adapter was trained on"
        )
    patterns = dict.fromkeys(pattern for _, scale in adapters if isinstance(scale, Mapping) for pattern in scale)
    idle = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if idle:
        raise ConfigError(
            f"--layer-scales: {', '.join(map(repr, idle))} match no weight that the adapters edit, such as {min(names)}; correct them"
        )
    if layout.tied_hits and not untie:
        raise ConfigError(
            f"{reader.path}: {' and '.join(sorted(layout.tied_hits))} share one tensor (tied embeddings), and "
            "a delta on one side would change both; --untie writes them apart"
        )
    return placed


def scale_of(scale: Scale, name: str) -> float:
    """The scale of one weight: the number itself, or that of the first pattern (a regular expression) found in the name."""
    if not isinstance(scale, Mapping):
        return float(scale)
    return next((float(value) for pattern, value in scale.items() if re.search(pattern, name)), 0.0)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[product of the leading dimensions, last]; a vector is a column, so that it can be cut anywhere."""
    if len(shape) <= 1:
        return (shape[0] if shape else 1), 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]
