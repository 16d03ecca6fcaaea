"""Find the parameter that an adapter means, whichever class or release of transformers named it.

In this order: a parameter of the class in config.json or of the text class of the same checkpoint; a name that transformers renames
while loading, since it knows the names of its earlier releases; the output head under another architecture's name; and the only
parameter that differs by levels such as `model.` and `language_model.` alone. Open this file when an adapter's weight is not found.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sku_vllm.adapter.transformers_names import ModelNames, names_of, text_names_of
from sku_vllm.checkpoint.reader import CheckpointReader

# Levels that classes put around the same layers: "ForCausalLM" or not, multimodal or not, text model or not.
LEVELS = {"model", "language_model", "text_model", "transformer", "llm"}
HEADS = {"lm_head.weight", "embed_out.weight", "unembed_tokens.weight", "output_layer.weight"}


class Found(NamedTuple):
    """A parameter of a class, or a tensor of the checkpoint where `names` is None.

    pattern: for an expert by itself that the class packs: the converter's pattern it matches; `parameter` is then the packed one.
    """

    names: ModelNames | None
    parameter: str
    pattern: str | None = None


class NameResolver:
    """Resolves names of parameters and modules in one checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader

    @functools.cached_property
    def declared(self) -> ModelNames | None:
        """The names of the class in config.json."""
        return names_of(self.reader)

    def classes(self) -> Iterator[ModelNames]:
        """The classes that load this checkpoint, built when they are asked for."""
        yield from (names for names in (self.declared, text_names_of(self.reader)) if names is not None)

    def find(self, name: str) -> Found | None:
        """The parameter of an adapter's `name`; None where there is none, or more than one could be meant."""
        for names in self.classes():
            if name in names.parameters:
                return self._declared(Found(names, name))
        for names in self.classes():
            target, how = names.renamed(name)
            if target in names.parameters:
                if how is not None and name in self.reader:
                    return Found(None, name)
                if how is None or len(how[0].target_patterns) == 1:
                    return self._declared(Found(names, target, how and how[1]))
        if name in self.reader:
            return Found(None, name)
        for names in self.classes():
            if names.head is not None and ".".join(name.split(".")[-2:]) in HEADS and _bare(name).count(".") == 1:
                return self._declared(Found(names, names.head))
        declared = self.declared
        alike = self._bare_names.get(_bare(name), [])
        return self._declared(Found(declared, alike[0])) if len(alike) == 1 else None

    def module(self, module: str) -> tuple[ModelNames, str] | None:
        """The class and module of these names that an adapter of packed experts means."""
        for names in self.classes():
            modules = {name for name, _ in names.model.named_modules()}
            if module in modules:
                return names, module
            alike = [name for name in modules if _bare(name) == _bare(module)]
            if len(alike) == 1:
                return names, alike[0]
        return None

    def _declared(self, found: Found) -> Found:
        """The same parameter by the name of the declared class, which knows best what is tied, if it has it."""
        declared = self.declared
        if found.names is None or declared is None or found.names is declared:
            return found
        sources = tuple(name for name, _ in found.names.sources.get(found.parameter, []))
        mine = declared.by_sources.get(sources)
        known = None if mine is None else declared.parameters.get(mine)
        if known is None or mine is None or known.shape != found.names.parameters[found.parameter].shape:
            return found
        return found._replace(names=declared, parameter=mine)

    @functools.cached_property
    def _bare_names(self) -> dict[str, list[str]]:
        names: Iterable[str] = self.reader.names if self.declared is None else self.declared.parameters
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(_bare(name), []).append(name)
        return alike


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in LEVELS)
