"""Find the rows of the checkpoint tensor that each delta is subtracted from, and list every mismatch, before anything is written.

Open this file to see how scales, also those of single layers, are applied.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.adapter.delta import Delta, LowRank, matrix_shape
from sku_vllm.adapter.quantised_weights import remedy
from sku_vllm.adapter.weight_names import Layout
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError, CheckpointError, ConfigError
from sku_vllm.kernels.delta_merge import Summand

LISTED = 20  # mismatches that one error names


@dataclass(frozen=True, slots=True)
class Placed:
    """scale·delta, to be subtracted from rows [row, row + rows of delta) of a checkpoint tensor seen as a matrix (`matrix_shape`)."""

    delta: Delta
    scale: float
    row: int = 0


Scale = float | Mapping[str, float]


def place(reader: CheckpointReader, adapters: Sequence[tuple[LoraAdapter, Scale]], *, untie: bool = False) -> dict[str, list[Placed]]:
    """For each checkpoint tensor that is edited, by name, the scaled deltas to subtract from it.

    Args:
        adapters: each with its scale, or with a mapping from patterns of weight names to scales (0 where none matches).
        untie: the output gets an `lm_head.weight` of its own, so deltas on tied embeddings are allowed.
    Raises:
        AdapterError: names or shapes that don't fit, all listed. CheckpointError: an edited weight is stored as a quantiser's codes.
        ConfigError: a delta on a tied tensor without `untie`, or a pattern that matches none of the adapters' weights.
    """
    layout = Layout(reader, untie=untie)
    placed: dict[str, list[Placed]] = {}
    names: set[str] = set()
    problems: list[str] = []
    unfit: list[LoraAdapter] = []
    for adapter, scale in adapters:
        scaled = functools.partial(scale_of, scale)
        found, wrong = layout.locate(adapter, scaled)
        unfit += [adapter] if wrong else []
        problems += [f"{adapter.path}: {problem}" for problem in wrong]
        names |= adapter.deltas.keys() | {piece.base_name for piece in found}
        for name, target, delta, row in found:
            placed.setdefault(target, []).append(Placed(delta, scaled(name), row))
    if layout.quantised:
        bases = sorted({str(adapter.run["base"]) for adapter, _ in adapters if adapter.quantised_base and adapter.run.get("base")})
        raise CheckpointError(
            f"{reader.path}: is quantised ({layout.quantised[0]}), so an edit cannot be added to {len(layout.quantised)} of the weights "
            f"that the adapters edit; {remedy(reader, bases)}"
        )
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        only_carried = len(layout.carried) == len(problems)
        what = "whole tensors" if only_carried else "deltas"
        raise AdapterError(
            f"{len(problems)} {what} do not fit {reader.path}: {'; '.join(problems[:LISTED])}{more}; "
            + _what_fits(reader, unfit, only_carried)
        )
    if layout.tied_hits and not untie:
        hits = sorted(layout.tied_hits)
        more = f" and {len(hits) - 2} more" if len(hits) > 2 else ""
        raise ConfigError(
            f"{reader.path}: {' and '.join(hits[:2])}{more} share one tensor (tied {'layers' if more else 'embeddings'}), and "
            "a delta on one side would change both; --untie writes them apart"
        )
    patterns = dict.fromkeys(pattern for _, scale in adapters if isinstance(scale, Mapping) for pattern in scale)
    idle = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if idle:
        raise ConfigError(
            f"--layer-scales: {', '.join(map(repr, idle))} match no weight that the adapters edit, such as {min(names)}; correct them"
        )
    return placed


def _what_fits(reader: CheckpointReader, unfit: Sequence[LoraAdapter], only_carried: bool) -> str:
    """What to do about adapters whose deltas fit nothing: another base, unless this very one is recorded as theirs.

    only_carried: what does not fit is no delta, but whole tensors saved beside them."""
    own = any(adapter.run.get("base_identity") == reader.identity() for adapter in unfit)
    if only_carried:
        return "train without retraining them" if own else "give the base this adapter was trained on, or train without retraining them"
    if own:
        return (
            "this is the base it was trained on, so the names come from another class or release of transformers; "
            "load the adapter with PEFT and the transformers of this installation, and save it again"
        )
    return "give the base this adapter was trained on, or, if only names differ, save it again with the transformers of this installation"


def scale_of(scale: Scale, name: str) -> float:
    """The scale of one weight: the number itself, or that of the first pattern (a regular expression) found in the name."""
    if not isinstance(scale, Mapping):
        return float(scale)
    return next((float(value) for pattern, value in scale.items() if re.search(pattern, name)), 0.0)


def terms_of(edit: Placed, begin: int, end: int) -> Iterator[Summand]:
    """The part of an edit on rows [begin, end) of the tensor, with rows counted from `begin`."""
    delta = edit.delta
    rows = matrix_shape(delta.shape)[0]
    low, high = max(begin, edit.row), min(end, edit.row + rows)
    if low >= high or edit.scale == 0:
        return
    inner = slice(low - edit.row, high - edit.row)
    if not isinstance(delta, LowRank):
        yield Summand(delta.mapped().reshape(matrix_shape(delta.shape))[inner], None, edit.scale, low - begin)
    elif delta.b.ndim == 2:
        yield Summand(delta.b[inner], delta.a, edit.scale * delta.scaling, low - begin)
    else:
        size = delta.b.shape[1]
        for expert in range(inner.start // size, -(-inner.stop // size)):
            start, stop = max(inner.start, expert * size), min(inner.stop, (expert + 1) * size)
            b = delta.b[expert, start - expert * size : stop - expert * size]
            yield Summand(b, delta.a[expert], edit.scale * delta.scaling, edit.row + start - begin)
