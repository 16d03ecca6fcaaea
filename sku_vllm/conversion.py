"""What transformers does to a checkpoint's names while loading it, asked of transformers itself on a model without memory."""

from collections.abc import Iterator
from typing import Any

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.delta import Dense, LowRank
from sku_vllm.errors import CheckpointError


class ModelNames:
    """Attributes:
    tied: tied parameter to the one it shares its tensor with (empty when untied).
    sources: parameter to its checkpoint tensors, [(name, None)] when it is that tensor, else [(name, (converter, pattern)), …];
        parameters cut from one tensor each have it.
    """

    @classmethod
    def of(cls, reader: CheckpointReader) -> "ModelNames | None":
        """None when transformers does not know the architecture (custom code, no config)."""
        if not reader.config.get("model_type"):
            return None
        import torch
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            # transformers would ask on a terminal whether to run a checkpoint's own code
            config = AutoConfig.from_pretrained(reader.directory, trust_remote_code=False)
            kind = getattr(transformers, (reader.config.get("architectures") or [""])[0], None)
            with torch.device("meta"):
                model = kind(config) if kind is not None else AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, OSError, ImportError, KeyError):
            return None
        except Exception as error:  # a configuration may hold anything
            raise CheckpointError(f"{reader.directory / 'config.json'}: transformers cannot build this model: {error}") from error
        return cls(model, reader)

    def __init__(self, model: Any, reader: CheckpointReader) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self._model = model
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        transforms = get_model_conversion_mapping(model)
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in transforms if not isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        self.sources: dict[str, list[tuple[str, Any]]] = {}
        for name in reader.names:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            how = (by_pattern[pattern], pattern) if pattern is not None else None
            if how is None and target != name and name in state:
                target = name
            first, *others = how[0].target_patterns if how else [target]
            for pattern in (first, *others):
                self.sources.setdefault(target.replace(first, pattern), []).append((name, how))

    def tied_source(self, name: str) -> str:
        """The checkpoint tensor that a tied parameter takes its values from."""
        shared = self.tied.get(name, name)
        return self.sources.get(shared, [(shared, None)])[0][0]

    def stored_in_by_out(self, name: str) -> bool | None:
        """Whether a linear module's weight is [in, out], as of GPT-2's Conv1D; None for what is no linear module."""
        from torch.nn import Linear
        from transformers.pytorch_utils import Conv1D

        try:
            module = self._model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None
        return isinstance(module, Conv1D) if isinstance(module, Conv1D | Linear) else None

    def parameters_of(self, module: str, targets: list[str]) -> list[tuple[str, tuple[int, ...], bool]]:
        """(name, shape, stored as [experts, in, out]) of a module's parameters among `targets`, in PEFT's wrapping order."""
        try:
            found = self._model.get_submodule(module)
        except AttributeError:
            return []
        named = [(f"{module}.{name}", tuple(parameter.shape)) for name, parameter in found.named_parameters(recurse=False)]
        transposed = bool(getattr(found, "is_transposed", False))
        return [
            (name, shape, transposed) for name, shape in named if any(name == target or name.endswith(f".{target}") for target in targets)
        ]

    def split(
        self, name: str, sources: list[tuple[str, Any]], delta: LowRank | Dense, reader: CheckpointReader
    ) -> Iterator[tuple[str, LowRank | Dense, bool, int]]:
        """A packed parameter's delta as pieces of the checkpoint tensors it was made from, or a cut one's as rows of its tensor."""
        from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, dot_natural_key

        from sku_vllm.layout import Mismatch

        converter = sources[0][1][0]
        kinds = [type(operation) for operation in converter.operations]
        if kinds == [Chunk] and converter.operations[0].dim == 0 and converter.operations[0].num_shards_attribute is None:
            (packed, _), parts = sources[0], converter.target_patterns
            rows = -(-reader.info(packed).shape[0] // len(parts))
            if delta.shape[0] != rows:
                raise Mismatch(f"{name}: delta {list(delta.shape)}, but it is {rows} rows of {packed}")
            yield packed, delta, False, rows * next(index for index, part in enumerate(parts) if part in name)
            return
        if not isinstance(delta, LowRank):
            raise Mismatch(
                f"{name}: a dense delta of a weight that the checkpoint stores in {len(sources)} parts; key it by the checkpoint's names"
            )
        groups = [sorted((key for key, how in sources if how[1] == pattern), key=dot_natural_key) for pattern in converter.source_patterns]
        if kinds == [MergeModulelist, Concatenate] and converter.operations[1].dim == 1 or kinds == [MergeModulelist]:
            first = 0
            for keys in groups:
                rows = reader.info(keys[0]).shape[0]
                for expert, key in enumerate(keys):
                    yield key, LowRank(delta.a[expert], delta.b[expert, first : first + rows], delta.scaling), True, 0
                first += rows
        elif kinds == [Concatenate] and converter.operations[0].dim == 0:
            first = 0
            for keys in groups:
                rows = reader.info(keys[0]).shape[0]
                yield keys[0], LowRank(delta.a, delta.b[first : first + rows], delta.scaling), True, 0
                first += rows
        elif kinds == [Transpose] and len(sources) == 1:
            yield sources[0][0], _as_stored(delta, reader.info(sources[0][0]).shape), True, 0
        else:
            steps = ", ".join(kind.__name__ for kind in kinds)
            raise Mismatch(f"{name}: the checkpoint stores it through {steps}, which a merge cannot follow; target other modules")


def _as_stored(delta: LowRank, shape: tuple[int, ...]) -> LowRank:
    """transformers transposes only where the shapes ask for it (check_dims)."""
    return delta if tuple(delta.shape) == tuple(shape) else delta.transposed
