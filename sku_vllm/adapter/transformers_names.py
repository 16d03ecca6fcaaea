"""How transformers renames, packs and splits a checkpoint's tensors while loading it.

The model is built on the meta device, which takes no memory, and transformers' own conversion mapping is read from it. One checkpoint
may be loaded by several classes: the multimodal one that its config names, and the text model that AutoModelForCausalLM picks out of it.

Open this file when transformers builds, names or ties the weights of an architecture in a new way.
"""

import functools
from collections.abc import Callable
from typing import Any

from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import CheckpointError

# A checkpoint tensor that a parameter is made from, and how: None as it is, else (transformers' converter, the pattern it matched).
Source = tuple[str, tuple[Any, str] | None]


class Mismatch(ValueError):
    """A delta that fits no tensor of the checkpoint; its text is one line of the error that lists them all."""


class ModelNames:
    """Which checkpoint tensors each parameter of one class is made from.

    Attributes:
        kind: the class's name. parameters: names of its parameters and buffers.
        tied: tied parameter to the one it shares its tensor with (empty when untied).
        sources: parameter to its checkpoint tensors; parameters that are cut from one tensor all list it, and one that is stored under
            two names lists both.
    """

    def __init__(self, model: Any, reader: CheckpointReader) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self.model, self.kind = model, type(model).__name__
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        transforms = get_model_conversion_mapping(model)
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._renamings: list[Any] = [entry for entry in transforms if not isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        self.parameters: dict[str, Any] = model.state_dict()
        self.sources: dict[str, list[Source]] = {}
        for name in reader.names:
            target, how = self.renamed(name)
            if how is None and target != name and name in self.parameters:
                target = name
            first, *others = how[0].target_patterns if how else [target]
            for pattern in (first, *others):
                self.sources.setdefault(target.replace(first, pattern), []).append((name, how))

    def renamed(self, name: str) -> tuple[str, tuple[Any, str] | None]:
        """What transformers makes of a tensor of this name: the parameter, and the (converter, pattern) that it goes through, if any.

        The names of earlier releases are among those it knows, since checkpoints carry them.
        """
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self.converters, self.model.base_model_prefix, self.parameters)
        return target, None if pattern is None else (self._by_pattern[pattern], pattern)

    def before_converter(self, name: str) -> str:
        """The name of a checkpoint tensor as the converters' patterns see it: only renamed."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self._renamings, [])[0])

    @functools.cached_property
    def by_sources(self) -> dict[tuple[str, ...], str]:
        """Parameter by the checkpoint tensors it is made from."""
        return {tuple(name for name, _ in sources): parameter for parameter, sources in self.sources.items()}

    @functools.cached_property
    def head(self) -> str | None:
        """The weight of the output embedding, or None."""
        head = self.model.get_output_embeddings()
        return next((f"{name}.weight" for name, module in self.model.named_modules() if head is not None and module is head), None)

    def stored_in_by_out(self, name: str) -> bool | None:
        """Whether a linear module's weight is [in, out], as of GPT-2's Conv1D; None for what is no linear module."""
        from torch.nn import Linear
        from transformers.pytorch_utils import Conv1D

        try:
            module = self.model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None
        return isinstance(module, Conv1D) if isinstance(module, Conv1D | Linear) else None

    def is_transposed(self, module: str) -> bool:
        """Whether a module of packed experts stores them as [experts, in, out]."""
        return bool(getattr(self.model.get_submodule(module), "is_transposed", False))

    def parameters_of(self, module: str) -> list[tuple[str, tuple[int, ...]]]:
        """(name inside the module, shape) of a module's own parameters, in PEFT's wrapping order."""
        return [(name, tuple(each.shape)) for name, each in self.model.get_submodule(module).named_parameters(recurse=False)]


@functools.lru_cache(maxsize=2)
def names_of(reader: CheckpointReader) -> ModelNames | None:
    """The names of the class in config.json; None when transformers does not know the architecture (custom code, no config).

    Raises:
        CheckpointError: transformers cannot build a model from config.json.
    """
    model = _build(reader, _declared_class)
    return None if model is None else ModelNames(model, reader)


@functools.lru_cache(maxsize=2)
def text_names_of(reader: CheckpointReader) -> ModelNames | None:
    """The names of the class that AutoModelForCausalLM loads, where that is another than `names_of`'s; else None."""
    declared = names_of(reader)
    model = None if declared is None else _build(reader, lambda config, auto: None)
    return None if model is None or declared is None or type(model) is type(declared.model) else ModelNames(model, reader)


def float32_parameters(reader: CheckpointReader, dtype: str) -> Callable[[str], bool] | None:
    """Whether transformers keeps a checkpoint tensor in float32 when it loads the model as `dtype`; None for an unknown architecture.

    It does so for what a class lists (`_keep_in_fp32_modules`) and for what a class creates in float32 whatever the dtype.
    """
    import torch
    from transformers.core_model_loading import build_glob_alternation

    names = names_of(reader)
    if names is None:
        return None
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = _build(reader, _declared_class)
    finally:
        torch.set_default_dtype(before)
    plan = model._get_dtype_plan(getattr(torch, dtype))
    listed = build_glob_alternation(list(plan))[0] if plan else None
    created = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    targets = {name: parameter for parameter, sources in names.sources.items() for name, _ in sources}

    def kept(name: str) -> bool:
        parameter = targets.get(name, name)
        return parameter in created or bool(listed and listed.search(parameter))

    return kept


def _declared_class(config: Any, reader: CheckpointReader) -> Any:
    import transformers

    return getattr(transformers, (reader.config.get("architectures") or [""])[0], None)


def _build(reader: CheckpointReader, class_of: Callable[[Any, CheckpointReader], Any]) -> Any:
    """A model on the meta device, of the class that `class_of` finds or else AutoModelForCausalLM's; None where there is none."""
    if not reader.config.get("model_type"):
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # without False transformers asks on a terminal whether to run a checkpoint's own code
        config = AutoConfig.from_pretrained(reader.directory, trust_remote_code=False)
        _set_dtype(config, torch.get_default_dtype())
        kind = class_of(config, reader)
        with torch.device("meta"):
            return kind(config) if kind is not None else AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]  # transformers' own
    except (ValueError, OSError, ImportError, KeyError):
        return None
    except Exception as error:  # a configuration may hold anything
        raise CheckpointError(f"{reader.directory / 'config.json'}: transformers cannot build this model: {error}") from error


def _set_dtype(config: Any, dtype: Any) -> None:
    """As from_pretrained does, in all sections: models inside a model are built in the dtype of their own section."""
    config.dtype = dtype
    for section in config.sub_configs:
        if getattr(config, section, None) is not None:
            _set_dtype(getattr(config, section), dtype)
