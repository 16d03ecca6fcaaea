"""From the names an adapter uses (transformers' parameters) to the names and rows a checkpoint stores.

Most checkpoints use the very same names, and then transformers is not imported (it takes seconds). Others differ by a prefix,
or store apart what the model holds packed (a mixture's experts) or the other way round: for these the model is built
without memory and its own weight conversion says which checkpoint tensor becomes which rows of which parameter.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from sku_vllm.adapter import LoraAdapter
from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.delta import Dense, LowRank
from sku_vllm.peft_format import rank_and_scaling

# Families of nn.Linear whose checkpoints transformers loads name by name (a test holds this against the installed transformers).
PLAIN = {
    "llama",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi",
    "phi3",
    "gpt_neox",
    "gpt_neo",
    "gptj",
    "bloom",
    "falcon",
    "olmo",
    "olmo2",
    "granite",
    "starcoder2",
    "stablelm",
    "cohere",
    "smollm3",
}
IN_A_LAYER = re.compile(r"\.\d+\.")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


class Located(NamedTuple):
    """`delta` of the weight `base_name` lands on rows [row, …) of the checkpoint tensor `target`."""

    base_name: str
    target: str
    delta: LowRank | Dense
    row: int


class Mismatch(ValueError):
    pass


class Layout:
    """One checkpoint's layout. `tied_hits` collects the tied tensors that deltas touched."""

    def __init__(self, reader: CheckpointReader, *, untie: bool = False) -> None:
        self.reader, self.untie = reader, untie
        self.tied_hits: set[str] = set()

    def locate(self, adapter: LoraAdapter) -> tuple[list[Located], list[str]]:
        """Where every delta goes, and one line for each that goes nowhere."""
        located, problems = [], []
        turned = bool(adapter.config.get("fan_in_fan_out"))
        deltas = ((name, self._as_stored(name, delta, turned)) for name, delta in adapter.deltas.items())
        for name, delta in [*deltas, *self._unstacked(adapter, problems)]:
            try:
                located += self._locate(name, delta)
            except Mismatch as error:
                problems.append(str(error))
        for name, copy in adapter.copies.items():
            problems += self._check_copy(name, copy)
        return located, problems

    def _is_plain(self, name: str) -> bool:
        """Whether it is known without transformers that a parameter is the tensor of that name."""
        return self.reader.config.get("model_type") in PLAIN and name in self.reader and bool(IN_A_LAYER.search(name))

    def _as_stored(self, name: str, delta: LowRank | Dense, turned: bool) -> LowRank | Dense:
        """PEFT transposes the edit of a Conv1D and of no nn.Linear; the `fan_in_fan_out` it saves is that of the module it came to last."""
        if isinstance(delta, Dense):
            return delta
        wanted = False if self._is_plain(name) else self._model.stored_in_by_out(name) if self._model else None
        return delta if wanted in (turned, None) else delta.transposed

    def _locate(self, name: str, delta: LowRank | Dense) -> list[Located]:
        if self._is_plain(name):
            return [self._fit(name, name, delta, whole=True)]
        return [self._fit(name, *piece) for piece in self._pieces(name, delta)]

    def _pieces(self, name: str, delta: LowRank | Dense) -> Iterator[tuple[str, LowRank | Dense, bool, int]]:
        """(checkpoint tensor, delta, whether it is all of it, first row) of one parameter's delta."""
        model = self._model
        if model is None:
            if name not in self.reader:
                raise Mismatch(f"{name}: the checkpoint has no such tensor, and transformers does not know its architecture")
            yield name, delta, True, 0
            return
        tied = model.tied.get(name)
        if tied is not None:
            self.tied_hits |= {name, tied}
            yield (name if self.untie else model.sources.get(tied, [(tied, None)])[0][0]), delta, True, 0
            return
        shared_by = [key for key, value in model.tied.items() if value == name]
        if shared_by and isinstance(delta, Dense):  # trained as the shared tensor that it is, so both sides take the edit
            stored = {alias: model.sources[alias][0][0] for alias in shared_by if alias in model.sources}
            yield from ((stored.get(alias, alias), delta, True, 0) for alias in shared_by if self.untie or alias in stored)
        elif shared_by:
            self.tied_hits |= {name, *shared_by}
        sources = model.sources.get(name)
        if not sources:
            if name not in self.reader:
                raise Mismatch(f"{name}: neither the model nor its checkpoint has such a weight")
            yield name, delta, True, 0
        elif sources[0][1] is None:
            yield sources[0][0], delta, True, 0
        else:
            yield from model.split(name, sources, delta, self.reader)

    def _fit(self, base_name: str, target: str, delta: LowRank | Dense, whole: bool = True, row: int = 0) -> Located:
        from sku_vllm.placement import matrix_shape

        source = self._model.tied_source(target) if self.untie and target not in self.reader else target
        info = self.reader.info(source)
        if info.dtype not in FLOATS:
            raise Mismatch(f"{base_name}: stored as {info.dtype}, not as a floating-point weight")
        rows, columns = matrix_shape(info.shape)
        mine = matrix_shape(delta.shape)
        if (mine != (rows, columns)) if whole else (mine[1] != columns or row + mine[0] > rows):
            hint = " (transposed: is fan_in_fan_out set rightly?)" if mine[::-1] == (rows, columns) else ""
            raise Mismatch(f"{base_name}: delta {list(delta.shape)}, but {target} is {list(info.shape)}{hint}")
        return Located(base_name, target, delta, row)

    def _unstacked(self, adapter: LoraAdapter, problems: list[str]) -> Iterator[tuple[str, LowRank]]:
        """PEFT's `target_parameters`: flattened factors of packed experts, as [experts, …] factors named after the parameter."""
        for module, wrappers in adapter.stacks.items():
            names = self._model.parameters_of(module, adapter.config["target_parameters"]) if self._model else []
            if len(names) != len(wrappers):
                problems.append(f"{module}: {len(wrappers)} targeted parameters, but the model has {len(names)} of these names there")
                continue
            for (name, shape, transposed), factors in zip(names, wrappers, strict=True):
                rank, scaling = rank_and_scaling(adapter.config, name)
                experts = shape[0] if len(shape) == 3 else 1
                if factors.a.shape[0] != rank * experts or factors.b.shape[1] != rank * experts:
                    problems.append(
                        f"{name}: factors {list(factors.b.shape)}·{list(factors.a.shape)} are not of rank {rank} for {experts} experts"
                    )
                    continue
                if len(shape) != 3:
                    yield name, LowRank(factors.a, factors.b, scaling)
                    continue
                a = factors.a.reshape(experts, rank, -1)
                b = factors.b.reshape(factors.b.shape[0], rank, experts).permute(2, 0, 1)
                stacked = LowRank(a, b, scaling)
                yield name, stacked.transposed if transposed else stacked

    def _check_copy(self, name: str, copy: Dense) -> list[str]:
        """PEFT stores an embedding along when it is targeted or resized; only an untouched one is no part of the edit."""
        model = self._model
        target = name
        if model is not None:
            target = model.sources.get(model.tied.get(name, name), [(name, None)])[0][0]
        if target not in self.reader:
            return [f"{name}: the adapter brings a copy of it, but the checkpoint has no such tensor"]
        mine, theirs = copy.tensor(), self.reader.tensor(target)
        if mine.shape != theirs.shape:
            return [f"{name}: the adapter brings its own, {list(mine.shape)} instead of {list(theirs.shape)} (vocabulary resized?)"]
        return (
            []
            if bool((mine.to(theirs.dtype) == theirs).all())
            else [f"{name}: the adapter brings a retrained copy of it, which is no LoRA edit"]
        )

    @cached_property
    def _model(self) -> "Any | None":
        from sku_vllm.conversion import ModelNames

        return ModelNames.of(self.reader)
