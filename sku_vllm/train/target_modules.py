"""Which layers get an adapter: those that `--target-modules` names, or every linear layer.

Open this file if a layer is adapted that should not be, or the reverse.
"""

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku_vllm.errors import ConfigError

ALL = "all-linear"
# A mixture's router decides which experts run: a delta there would change routing, and vLLM takes no adapter for it.
ROUTERS = ("router", "gate", "shared_expert_gate")
# Model types whose state-space layers read these weights past the module, where PEFT puts no LoRA (peft/tuners/tuners_utils.py).
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
PAST_THE_MODULE = ("out_proj", "conv1d")


def resolve_targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """Module names PEFT and vLLM both understand ("q_proj"), for `all-linear` every linear layer but head and routers.

    A name that other modules have too, which PEFT would take as well, is given with as many levels as tell it apart ("ffn.0").

    Raises:
        ConfigError: a name that no linear layer has, or the head, which is applied in chunks outside the adapter.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    linear: list[str] = []
    others: set[str] = set()
    for name, module in model.named_modules():
        # a grouped layer has an input for each group, which is no product with one matrix
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not hasattr(module, "n_groups"):
            linear.append(name)
        else:
            others |= set(_ends(name))
    names: dict[str, set[str]] = {}
    for name in linear:
        short = next((end for end in _ends(name) if end not in others), name)
        names.setdefault(name.rpartition(".")[2], set()).add(short)
    if ALL in wanted:
        left_out = {*ROUTERS, *(PAST_THE_MODULE if model.config.model_type in MAMBA else ())}
        return sorted(short for name, shorts in names.items() if name not in left_out for short in shorts)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(
            f"--target-modules {unknown[0]}: this model has no such linear layer; choose from {', '.join(sorted(names))} or {ALL}"
        )
    return [short for name in wanted for short in sorted(names[name])]


def _ends(name: str) -> list[str]:
    """The last level of a module's name, the last two, and so on."""
    levels = name.split(".")
    return [".".join(levels[-count:]) for count in range(1, len(levels) + 1)]
