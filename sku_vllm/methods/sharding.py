"""FSDP2: parameters live in shards over the processes and are gathered where a file or a copy needs them whole."""

import os
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from sku_vllm.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sku_vllm.methods.objective import Objective


def check_launch() -> None:
    """Whether `accelerate launch` asked for an engine we train with.

    Raises:
        ConfigError: FSDP1 or DeepSpeed, whose flattened parameters have no names to be saved by.
    """
    if _asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate launch --use_fsdp: FSDP1 is not supported; add --fsdp_version 2")
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("accelerate launch --use_deepspeed: not supported; use DDP (--multi_gpu), or FSDP2 (--use_fsdp --fsdp_version 2)")


def shard_on_cpu(accelerator: "Accelerator") -> None:
    """Let `accelerate launch --use_fsdp` shard on CPUs as well: accelerate 1.x would quietly copy the model; torch's FSDP2 runs on gloo."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type == DistributedType.MULTI_CPU and _asked("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # In both, since each new AcceleratorState copies what PartialState has.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def prepare(objective: "Objective", accelerator: "Accelerator") -> torch.nn.Module:
    """The objective for its processes: alone, wrapped by DDP, or sharded layer by layer by FSDP2."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(objective)
    objective.alike = True
    plugin = accelerator.state.fsdp_plugin
    # Without a policy the whole model is one unit, which every pass would gather at once.
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    # accelerate prepares an FSDP2 model with an optimizer only; the real one is made afterwards, as in every round.
    sharded = accelerator.prepare(objective, torch.optim.SGD(trained, lr=0.0))[0]
    register_fsdp_forward_method(sharded, "gathered")
    return sharded


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered from its shards; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def give_up(module: torch.nn.Module) -> None:
    """Forget what was gathered, since its shards have changed."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def sharded_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut the way the parameter is; the same on every process to begin with."""
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else value
