"""Read a tensor key of an adapter file: which module it belongs to, which factor it is, and what wraps that name.

Saving from inside torch.compile, FSDP, activation checkpointing, DDP or a second PEFT wrapper leaves the wrapper's name in the keys.
The module is the same, so these names are taken off. Open this file when keys of another tool or wrapper are not understood.
"""

import re
from typing import NamedTuple

# Path components that a wrapper puts before the module it wraps, anywhere in a name.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
WRAPPERS |= {"_module", "pretrained_model"}  # Opacus, TRL's value heads
# PEFT's own levels: first in a name, or inside, where another wrapper (a trainer's `model.`) is around PEFT's model.
PEFT = re.compile(r"(^|\.)base_model\.model\.")
OUTER = "module."  # DDP's or DeepSpeed's; no module of transformers has a first level of this name
FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.weight)?$"
)
# Buffers that a LoRA variant needs in its backward pass only: VeLoRA compresses activations, its edit is B@A all the same.
TRAINING_ONLY = re.compile(r"\.lora_velora_embed(\..+)?$")


class FactorKey(NamedTuple):
    """A key of a LoRA factor.

    Attributes:
        module: its module, without wrappers; PEFT's nested `.base_layer` are kept, since they tell the parameters of experts apart.
        side: "A" or "B". embedding: whether it is a factor of an embedding. adapter: the adapter's name in the key, mostly none.
    """

    module: str
    side: str
    embedding: bool
    adapter: str | None

    @property
    def key(self) -> str:
        """The key under which PEFT saves this factor, and under which PEFT and vLLM look for it."""
        return f"base_model.model.{self.module}.lora_{'embedding_' * self.embedding}{self.side}{'' if self.embedding else '.weight'}"


def unwrapped(name: str) -> str:
    """A parameter's name as its model has it, without the levels that wrappers and PEFT add."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    before = ""
    while name != before:
        before, name = name, PEFT.sub(r"\1", name).removeprefix(OUTER)
    return name


def factor_key(key: str) -> FactorKey | None:
    """What `key` says of a LoRA factor; None for any other tensor."""
    match = FACTOR.match(unwrapped(key))
    return match and FactorKey(match["module"], match["side"], bool(match["embedding"]), match["adapter"])


def is_copy(key: str) -> bool:
    """Whether `key` can be a whole tensor of the base that PEFT saved along (embeddings), under any architecture's names."""
    return key.endswith((".weight", ".bias")) and ".lora_" not in key


def copied_name(key: str) -> str:
    """The base's name for a tensor that was saved along."""
    return unwrapped(key).replace(".base_layer.", ".")
