"""Translate the parameter names of an adapter (those of transformers) into the tensor names and rows of a checkpoint.

Most checkpoints use the same names, and then transformers, whose import takes seconds, is not needed. In others names have another
prefix, or tensors are stored apart that the model packs into one parameter (a mixture's experts), or the reverse: for these
`transformers_names.py` says which checkpoint tensor becomes which rows of which parameter. Open this file when an adapter's weight
is not found in its base.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.adapter.conversions import Piece, one_expert, split
from sku_vllm.adapter.delta import Delta, Dense, LowRank, matrix_shape
from sku_vllm.adapter.name_resolver import Found, NameResolver
from sku_vllm.adapter.packed_experts import PackedParameter, unpack
from sku_vllm.adapter.quantised_weights import code_of
from sku_vllm.adapter.saved_copies import why_no_copy
from sku_vllm.adapter.tied_weights import Edit, Ties
from sku_vllm.adapter.transformers_names import Mismatch
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError

# Model types, with nn.Linear layers, whose layers have the same names in checkpoint and model; a test checks the installed transformers.
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
NUMBER = re.compile(r"\.(\d+)\.")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


# A parameter, and which of its experts, if one alone.
Meant = tuple[str, str]


class Located(NamedTuple):
    """`delta`, which the adapter names `base_name`, is subtracted, scaled, from rows [row, …) of the checkpoint tensor `target`."""

    base_name: str
    target: str
    delta: Delta
    row: int


class Layout:
    """Finds the place of deltas in one checkpoint.

    Attributes:
        untie: every tied parameter gets a tensor of its own in the output. tied_hits: tied parameters that an edit of one would change.
        quantised, carried: of the problems, those of weights that the checkpoint stores as codes, and those of whole tensors that an
            adapter carries along.
    """

    def __init__(self, reader: CheckpointReader, *, untie: bool = False) -> None:
        self.reader, self.untie = reader, untie
        self.tied_hits: set[str] = set()
        self.quantised: list[str] = []
        self.carried: list[str] = []
        self.resolver = NameResolver(reader)

    def locate(self, adapter: LoraAdapter, scale_of: Callable[[str], float]) -> tuple[list[Located], list[str]]:
        """The place of every delta, and a line for each that has none saying why.

        Args:
            scale_of: the scale of a weight by the adapter's name for it; edits of both sides of a tie are compared with it.
        """
        problems: list[str] = []
        transposed = bool(adapter.config.get("fan_in_fan_out"))
        edits: list[tuple[Edit, bool | None]] = [(Edit(name, delta), transposed) for name, delta in adapter.deltas.items()]
        edits += [(Edit(name, delta), None) for name, delta in self._unstacked(adapter, problems)]
        located: list[Located] = []
        tied: dict[str, Edit] = {}
        meant: dict[Meant, str] = {}
        for edit, flipped in edits:
            try:
                located += self._locate(edit, flipped, tied, meant)
            except Mismatch as error:
                problems.append(str(error))
            except AdapterError as error:
                raise AdapterError(f"{adapter.path}: {error}") from error
        for result in self.ties.resolve(tied, scale_of, self.untie) if tied else ():
            if isinstance(result, str):
                self.tied_hits.add(result)
            else:
                located.append(self._fit(result[0], Piece(result[1], result[0].delta)))
        carried = self.check_copies(adapter)
        self.carried += carried
        return located, problems + carried

    @cached_property
    def ties(self) -> Ties:
        """The checkpoint's tied parameters."""
        return Ties(self.reader, self.resolver.declared)

    def check_copies(self, adapter: LoraAdapter) -> list[str]:
        """A line for each tensor the adapter carries along that is not the base's own, and so a part of the edit that is no LoRA."""
        lines = (self._check_copy(name, copy) for name, copy in adapter.copies.items())
        return [line for line in lines if line is not None]

    def declared_module(self, module: str) -> str:
        """The name of an adapter's module in the class of config.json, which vLLM looks for; `module` itself where no class is known."""
        name = f"{module}.weight"
        found = None if self._is_plain(name) else self.resolver.find(name)
        if found is None or found.names is None or found.pattern is not None:
            return module
        return found.parameter.removesuffix(".weight")

    def _is_plain(self, name: str) -> bool:
        """Whether the parameter is known, without importing transformers, to be the checkpoint tensor of the same name and no other."""
        twin = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
        known = self.reader.config.get("model_type") in PLAIN and bool(IN_A_LAYER.search(name))
        return known and name in self.reader and twin not in self.reader

    def _locate(self, edit: Edit, transposed: bool | None, tied: dict[str, Edit], meant: dict[Meant, str]) -> list[Located]:
        """The places of one edit; an edit of a tied parameter goes to `tied` instead, until all of them are known.

        transposed: whether `fan_in_fan_out` has transposed it already; None where orientation is settled. PEFT transposes edits of Conv1D
        layers and not of nn.Linear, but saves only one flag, that of the last layer it adapted.
        meant: the names of this adapter's edits so far, by what they edit.
        """
        if self._is_plain(edit.name):
            edit = _turned(edit) if transposed else edit
            _once(meant, (edit.name, ""), edit)
            return [self._fit(edit, Piece(edit.name, edit.delta))]
        found = self.resolver.find(edit.name) or (Found(None, edit.name) if edit.name in self.ties.shared else None)
        if found is None:
            unknown = "" if self.resolver.declared else ", and transformers does not know its architecture"
            raise self._missing(edit, edit.name, f"the checkpoint has no such tensor{unknown}")
        _once(meant, (found.parameter, "" if found.pattern is None else f"{found.pattern} {NUMBER.findall(edit.name)[-1]}"), edit)
        wanted = None if found.names is None else found.names.stored_in_by_out(found.parameter)
        if transposed is not None and wanted not in (transposed, None):
            edit = _turned(edit)
        if self.ties.root(found.parameter) is not None and found.names is self.ties.names:
            tied[found.parameter] = edit
            return []
        return [self._fit(edit, piece) for piece in self._pieces(found, edit)]

    def _pieces(self, found: Found, edit: Edit) -> Iterator[Piece]:
        """The edit of one parameter as edits of checkpoint tensors."""
        if found.names is None:
            yield Piece(found.parameter, edit.delta)
            return
        sources = found.names.sources.get(found.parameter, [])
        if not sources:
            raise self._missing(edit, found.parameter, "neither the model nor its checkpoint has such a weight")
        if found.pattern is not None:
            yield one_expert(found.names, found.parameter, edit.name, found.pattern, edit.delta)
        elif sources[0][1] is None:
            yield from (Piece(tensor, edit.delta) for tensor, _ in sources)
        else:
            yield from split(found.names, found.parameter, sources, edit.delta, self.reader)

    def _missing(self, edit: Edit, parameter: str, why: str) -> Mismatch:
        code = code_of(self.reader, parameter)
        if code is None:
            return Mismatch(f"{edit.name}: {why}")
        self.quantised.append(f"{code.name} is {code.dtype}")
        return Mismatch(f"{edit.name}: {self.quantised[-1]}")

    def _fit(self, edit: Edit, piece: Piece) -> Located:
        untied = self.ties if self.untie and piece.target not in self.reader else None
        info = self.reader.info(piece.target if untied is None else untied.written_alone()[piece.target])
        if code_of(self.reader, info.name) is not None or info.dtype not in FLOATS:
            raise self._missing(edit, info.name, f"stored as {info.dtype}, not as a floating-point weight")
        rows, columns = matrix_shape(info.shape)
        mine = matrix_shape(piece.delta.shape)
        if (mine != (rows, columns)) if piece.whole else (mine[1] != columns or piece.row + mine[0] > rows):
            hint = " (transposed: is fan_in_fan_out set rightly?)" if mine[::-1] == (rows, columns) else ""
            raise Mismatch(f"{edit.name}: delta {list(piece.delta.shape)}, but {piece.target} is {list(info.shape)}{hint}")
        return Located(edit.name, piece.target, piece.delta, piece.row)

    def _unstacked(self, adapter: LoraAdapter, problems: list[str]) -> Iterator[tuple[str, LowRank]]:
        """Factors of packed experts (PEFT's `target_parameters`), saved flattened over experts, as (name, [experts, …] factors)."""
        yield from unpack(self.packed(adapter, problems), adapter.config, problems)

    def packed(self, adapter: LoraAdapter, problems: list[str]) -> list[PackedParameter]:
        """The adapter's factors of packed experts with their parameters; appends to `problems` what the model does not have."""
        packed: list[PackedParameter] = []
        targets = adapter.config.get("target_parameters") or []
        for module, wrappers in adapter.stacks.items():
            found = self.resolver.module(module)
            inside = found[0].parameters_of(found[1]) if found else []
            named = [(f"{module}.{leaf}", shape) for leaf, shape in inside]
            named = [(name, shape) for name, shape in named if any(f".{name}".endswith(f".{target}") for target in targets)]
            if found is None or len(named) != len(wrappers):
                problems.append(f"{module}: {len(wrappers)} targeted parameters, but the model has {len(named)} of these names there")
                continue
            transposed = found[0].is_transposed(found[1])
            packed += [PackedParameter(*each, transposed, factors) for each, factors in zip(named, wrappers, strict=True)]
        return packed

    def _check_copy(self, name: str, copy: Dense) -> str | None:
        found = self.resolver.find(name)
        parameter = name if found is None else found.parameter
        root = self.ties.root(parameter)
        names = [parameter] if found is None or found.names is None else [source for source, _ in found.names.sources.get(parameter, [])]
        stored = next((tensor for tensor in (*names, *(self.ties.stored(root) if root else ())) if tensor in self.reader), None)
        return why_no_copy(name, copy, self.reader, stored)


def _turned(edit: Edit) -> Edit:
    return replace(edit, delta=edit.delta.transposed) if isinstance(edit.delta, LowRank) else edit


def _once(meant: dict[Meant, str], what: Meant, edit: Edit) -> None:
    """Note which parameter an edit is of; refuse a second one of it, as of an adapter whose names were mapped and merged by hand."""
    other = meant.setdefault(what, edit.name)
    if other != edit.name:
        raise AdapterError(f"{edit.name} is the same weight as {other}, and nothing says which edit is meant; save one of them")
