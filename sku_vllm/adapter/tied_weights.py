"""Parameters that share one tensor: input and output embeddings that are tied.

transformers says which they are; for an architecture it does not know, config.json and the checkpoint do. Open this file when an
edit of embeddings is refused, or reaches the wrong side.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.adapter.delta import Delta, Dense, Held, LowRank
from sku_vllm.adapter.transformers_names import ModelNames
from sku_vllm.checkpoint.reader import CheckpointReader

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|unembed_tokens|output_layer)\.weight$|^(model\.)?(output|head)\.weight$")


def tied_by_config(reader: CheckpointReader) -> dict[str, str]:
    """Tied parameter to the one it shares its tensor with, where only config.json can tell.

    Where it does not say, a head is tied that is missing, or stored a second time.
    """
    embeddings, heads = ([name for name in reader.names if pattern.search(name)] for pattern in (EMBEDDING, HEAD))
    sections = [reader.config, *(value for key, value in reader.config.items() if key.endswith("_config") and isinstance(value, dict))]
    said = [section["tie_word_embeddings"] for section in sections if section.get("tie_word_embeddings") is not None]
    if len(embeddings) != 1:
        return {}
    if not (any(said) if said else not heads or _equal(reader, heads[0], embeddings[0])):
        return {}
    return {heads[0] if heads else "lm_head.weight": embeddings[0]}


def _equal(reader: CheckpointReader, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same values."""
    import torch

    return reader.info(one).shape == reader.info(other).shape and torch.equal(reader.mapped(one), reader.mapped(other))


@dataclass(frozen=True, slots=True)
class Edit:
    """A delta, which the adapter names `name`, of one parameter."""

    name: str
    delta: Delta


class Ties:
    """The groups of tied parameters of one checkpoint, by the names of `names`, or those of its tensors where `names` is None."""

    def __init__(self, reader: CheckpointReader, names: ModelNames | None) -> None:
        self.reader, self.names = reader, names
        self.shared: dict[str, str] = names.tied if names is not None else tied_by_config(reader)

    def root(self, parameter: str) -> str | None:
        """The parameter of the group that is not tied to another; None for a parameter in no group."""
        return self.shared.get(parameter, parameter if parameter in self.shared.values() else None)

    def stored(self, parameter: str) -> list[str]:
        """The checkpoint tensors that hold a copy of it."""
        if self.names is not None:
            return [name for name, _ in self.names.sources.get(parameter, [])]
        return [parameter] if parameter in self.reader else []

    def group(self, root: str) -> list[str]:
        """The tied parameters whose root is `root`, which comes first."""
        return [root, *(alias for alias, shared in self.shared.items() if shared == root)]

    def written_alone(self) -> dict[str, str]:
        """Tied parameters that the checkpoint does not hold, as an untied one does, with the tensor each takes its values from."""
        alone: dict[str, str] = {}
        for root in dict.fromkeys(self.shared.values()):
            sources = [tensor for parameter in self.group(root) for tensor in self.stored(parameter)]
            alone |= {parameter: next(iter(sources), root) for parameter in self.group(root) if not self.stored(parameter)}
        return alone

    def _stored_apart(self, group: Sequence[str]) -> bool:
        """Whether the checkpoint holds sides of a tie with different values: transformers then takes them for untied."""
        first, *others = [tensor for parameter in group for tensor in self.stored(parameter)]
        return not all(_equal(self.reader, first, other) for other in others)

    def resolve(self, edits: Mapping[str, Edit], scale_of: Callable[[str], float], untie: bool) -> Iterator[tuple[Edit, str] | str]:
        """(edit, checkpoint tensor) for the edits of tied parameters, or the name of one whose edit would change the others too.

        Edits that are the same on all sides keep the tie, and a dense delta of the shared tensor is one: training moved all sides.

        Args:
            edits: one adapter's, by parameter. scale_of: the scale of an edit by its name.
            untie: every parameter has a tensor of its own in the output.
        """
        for root in dict.fromkeys(root for parameter in edits if (root := self.root(parameter)) is not None):
            group = self.group(root)
            mine = {parameter: edits[parameter] for parameter in group if parameter in edits}
            whole = list(mine) == [root] and not isinstance(mine[root].delta, LowRank) and not self._stored_apart(group)
            if whole or (len(mine) == len(group) and _all_same(list(mine.values()), scale_of)):
                mine = dict.fromkeys(group, mine[root])
            elif not untie:
                yield from group
                continue
            for parameter, edit in mine.items():
                tensors = self.stored(parameter) or ([parameter] if untie else [])
                yield from ((edit, tensor) for tensor in tensors)


def _all_same(edits: Sequence[Edit], scale_of: Callable[[str], float]) -> bool:
    """Whether all edits subtract the same; compared by factors, so that different factors of one product do not count."""
    first, *others = edits
    return all(scale_of(edit.name) == scale_of(first.name) and _same(edit.delta, first.delta) for edit in others)


def _same(one: Delta, other: Delta) -> bool:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        pairs = [(one.a, other.a), (one.b, other.b)]
        return one.scaling == other.scaling and all(x.shape == y.shape and bool((x == y).all()) for x, y in pairs)
    if isinstance(one, Dense | Held) and isinstance(other, Dense | Held):
        return one.shape == other.shape and bool((one.mapped() == other.mapped()).all())
    return False
