"""Follow a delta backwards through what transformers does to weights while loading: deltas of the checkpoint's tensors.

Where a parameter is packed from several tensors or cut from one, the usual steps have a form that keeps a low-rank delta low-rank.
Any other chain of steps is run backwards by transformers itself, on the delta's values. Open this file when transformers stores
weights through a new step.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sku_vllm.adapter.delta import Delta, Dense, Held, LowRank, matrix_shape
from sku_vllm.adapter.transformers_names import Mismatch, ModelNames, Source
from sku_vllm.checkpoint.reader import CheckpointReader


class Piece(NamedTuple):
    """`delta` is subtracted from rows [row, …) of the checkpoint tensor `target`, or from all of it (`whole`)."""

    target: str
    delta: Delta
    whole: bool = True
    row: int = 0


def split(names: ModelNames, parameter: str, sources: Sequence[Source], delta: Delta, reader: CheckpointReader) -> Iterator[Piece]:
    """Split the delta of a parameter that goes through a converter into deltas of the checkpoint's tensors.

    Raises:
        Mismatch: shapes do not agree, or transformers cannot run the conversion backwards.
    """
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, dot_natural_key

    converter = sources[0][1][0] if sources[0][1] else None
    assert converter is not None
    kinds, operations = [type(operation) for operation in converter.operations], converter.operations
    if kinds == [Chunk] and operations[0].dim == 0 and operations[0].num_shards_attribute is None:
        (packed, _), parts = sources[0], converter.target_patterns
        rows = -(-reader.info(packed).shape[0] // len(parts))
        if delta.shape[0] != rows:
            raise Mismatch(f"{parameter}: delta {list(delta.shape)}, but it is {rows} rows of {packed}")
        yield Piece(packed, delta, False, rows * next(index for index, part in enumerate(parts) if part in parameter))
        return
    groups = [
        sorted((key for key, how in sources if how and how[1] == pattern), key=dot_natural_key) for pattern in converter.source_patterns
    ]
    groups = [keys for keys in groups if keys]
    merged = kinds[:1] == [MergeModulelist] and operations[0].dim == 0
    if merged and (kinds[1:] == [] or (kinds[1:] == [Concatenate] and operations[1].dim == 1)):
        yield from _experts(parameter, groups, delta, reader)
    elif kinds == [Concatenate] and operations[0].dim == 0 and all(len(keys) == 1 for keys in groups):
        first = 0
        for (key,) in groups:
            rows = reader.info(key).shape[0]
            yield Piece(key, _rows(delta, slice(first, first + rows)))
            first += rows
    elif kinds == [Transpose] and len(sources) == 1:
        stored = reader.info(sources[0][0]).shape  # with check_dims, transformers leaves alone what has the parameter's shape already
        as_is = operations[0].check_dims and tuple(stored) == tuple(names.parameters[parameter].shape)
        yield Piece(sources[0][0], delta if as_is else _transposed(delta))
    else:
        yield from _backwards(names, parameter, converter, sources, delta, reader)


def _experts(parameter: str, groups: Sequence[Sequence[str]], delta: Delta, reader: CheckpointReader) -> Iterator[Piece]:
    """Pieces of experts that are stacked, after their parts (gate and up) have been put below each other."""
    total = (len(groups[0]), sum(reader.info(keys[0]).shape[0] for keys in groups), reader.info(groups[0][0]).shape[-1])
    if tuple(delta.shape) != total:
        raise Mismatch(f"{parameter}: delta {list(delta.shape)}, but the checkpoint's experts make {list(total)}")
    first = 0
    for keys in groups:
        rows = slice(first, first + reader.info(keys[0]).shape[0])
        for expert, key in enumerate(keys):
            yield Piece(key, _rows(delta, rows, expert))
        first = rows.stop


def _rows(delta: Delta, rows: slice, expert: int | None = None) -> Delta:
    """Rows of a delta [rows, columns], or of one expert of [experts, rows, columns]."""
    if isinstance(delta, LowRank):
        a, b = (delta.a, delta.b) if expert is None else (delta.a[expert], delta.b[expert])
        return LowRank(a, b[rows], delta.scaling)
    part = (rows,) if expert is None else (expert, rows)
    return delta.of(*part) if isinstance(delta, Dense) and not delta.part else Held(delta.mapped()[part])


def _transposed(delta: Delta) -> Delta:
    return delta.transposed if isinstance(delta, LowRank) else Held(delta.mapped().mT.contiguous())


def _backwards(
    names: ModelNames, parameter: str, converter: Any, sources: Sequence[Source], delta: Delta, reader: CheckpointReader
) -> Iterator[Piece]:
    """Pieces by transformers' own reverse of the converter, run on the delta's values; parameters of one tensor that have no delta
    of their own count as unchanged."""
    import torch

    if isinstance(delta, LowRank):
        values = (delta.b.double() @ delta.a.double() * delta.scaling).float()
    else:
        values = delta.mapped()
    if tuple(values.shape) != tuple(names.parameters[parameter].shape):
        raise Mismatch(f"{parameter}: delta {list(values.shape)}, but it is {list(names.parameters[parameter].shape)}")
    mine = next((part for part in converter.target_patterns if part in parameter), None)
    reverse = converter.reverse_transform()
    try:
        for part, pattern in zip(converter.target_patterns, reverse.source_patterns, strict=True):
            other = parameter if part == mine else parameter.replace(str(mine), part)
            value = values if part == mine else torch.zeros(names.parameters[other].shape, dtype=values.dtype)
            reverse.add_tensor(other, other, pattern, value)
        made = reverse.convert(parameter, model=names.model, config=names.model.config)
    except Exception as error:  # whatever a step of transformers raises
        steps = ", ".join(type(step).__name__ for step in converter.operations)
        raise Mismatch(
            f"{parameter}: stored through {steps}, which transformers cannot run backwards ({error}); target other modules"
        ) from error
    stored = {names.before_converter(name): name for name, _ in sources}
    for key, value in made.items():
        value = value[0] if isinstance(value, list) else value
        found = [name for inner, name in stored.items() if key == inner or key.endswith(f".{inner}") or inner.endswith(f".{key}")]
        if len(found) != 1 or matrix_shape(value.shape) != matrix_shape(reader.info(found[0]).shape):
            raise Mismatch(f"{parameter}: its delta belongs to {key} {list(value.shape)}, which the checkpoint does not hold so")
        yield Piece(found[0], Held(value.contiguous()))


def one_expert(names: ModelNames, parameter: str, name: str, pattern: str, delta: Delta) -> Piece:
    """The piece of an expert's own delta where the class packs experts into `parameter`.

    Args:
        name: the adapter's, which has the expert's number. pattern: the converter's, of the part (gate, up or down) that it is.

    Raises:
        Mismatch: the packed tensor is transposed or interleaved, so that an expert's part is not some of its rows.
    """
    from transformers.core_model_loading import dot_natural_key

    sources = names.sources[parameter]
    number = int(re.findall(r"\.(\d+)\.", name)[-1])
    alike = sorted((tensor for tensor, how in sources if how is not None and how[1] == pattern), key=dot_natural_key)
    if alike:  # the checkpoint has this expert by itself, under a name with other levels
        if number >= len(alike):
            raise Mismatch(f"{name}: the checkpoint has {len(alike)} experts")
        return Piece(alike[number], delta)
    shape = tuple(names.parameters[parameter].shape)
    parts = next(converter for converter in names.converters if pattern in converter.source_patterns).source_patterns
    if sources[0][1] is not None or names.is_transposed(parameter.rpartition(".")[0]) or len(shape) != 3 or number >= shape[0]:
        raise Mismatch(f"{name}: the checkpoint packs experts into {parameter} {list(shape)}, where this one is not some rows")
    rows = shape[1] // len(parts)
    if tuple(delta.shape) != (rows, shape[2]):
        raise Mismatch(f"{name}: delta {list(delta.shape)}, but it is {[rows, shape[2]]} of {parameter}")
    return Piece(sources[0][0], delta, False, number * shape[1] + parts.index(pattern) * rows)
