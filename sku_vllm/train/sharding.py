"""Train on several processes by DDP or FSDP2. FSDP2 keeps weights in shards, which are gathered to save or copy a weight.

Open this file to support another way of distributing a run.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from sku_vllm.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sku_vllm.methods.method import Phase
    from sku_vllm.train.objective import Objective


def check_launch() -> None:
    """Check that `accelerate launch` was not told to use FSDP1 or DeepSpeed.

    Raises:
        ConfigError: FSDP1 or DeepSpeed, whose flattened parameters have no names to be saved by.
    """
    if _asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate launch --use_fsdp: FSDP1 is not supported; add --fsdp_version 2")
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("accelerate launch --use_deepspeed: not supported; use DDP (--multi_gpu), or FSDP2 (--use_fsdp --fsdp_version 2)")


def shard_on_cpu(accelerator: "Accelerator") -> None:
    """Make `accelerate launch --use_fsdp` shard on CPUs too: accelerate 1.x silently replicates the model there; FSDP2 runs on gloo."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type == DistributedType.MULTI_CPU and _asked("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # In both, since each new AcceleratorState copies what PartialState has.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def prepare(objective: "Objective", accelerator: "Accelerator", phases: Sequence["Phase"]) -> torch.nn.Module:
    """The objective for its processes: alone, wrapped by DDP, or sharded layer by layer by FSDP2.

    `phases`: what will be trained. Where losses read the states of a layer in between, those above it get no gradients.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    if not accelerator.is_fsdp2:
        if any(term.depth is not None for phase in phases for term in phase.terms):
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        prepared: torch.nn.Module = accelerator.prepare(objective)
        return prepared
    objective.alike = True
    plugin = accelerator.state.fsdp_plugin
    # Without a policy the whole model is one unit, which every pass would gather at once.
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    # accelerate prepares an FSDP2 model only together with an optimizer; `Run` makes the one that is used, anew for every phase.
    sharded: torch.nn.Module = accelerator.prepare(objective, torch.optim.SGD(trained, lr=0.0))[0]
    register_fsdp_forward_method(sharded, "gathered")
    return sharded


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from its shards; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def give_up(module: torch.nn.Module) -> None:
    """Free the weights that were gathered from shards, since the shards have changed."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def sharded_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on every process, cut into shards as the parameter is; in the parameter's dtype and on its device."""
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else value
