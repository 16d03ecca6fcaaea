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


def resolve_targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """Module names PEFT and vLLM both understand ("q_proj"), for `all-linear` every linear layer but head and routers.

    Raises:
        ConfigError: a name that no linear layer has, or the head, which is applied in chunks outside the adapter.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if ALL in wanted:
        return sorted(names - set(ROUTERS))
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(
            f"--target-modules {unknown[0]}: this model has no such linear layer; choose from {', '.join(sorted(names))} or {ALL}"
        )
    return list(wanted)
