"""`NAME@SCALE` as a model: vLLM asks here for adapters it does not know, and gets base − SCALE·delta of one below a fixed root.

vLLM consults resolvers only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and the middleware lets only trusted clients get this far.
"""

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from sku_vllm.errors import InputError
from sku_vllm.serving.arms import Arm, quantised
from sku_vllm.serving.materialise import materialise

if TYPE_CHECKING:
    from sku_vllm.serving.runtime import Runtime

MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})@([0-9.]{1,6})")


def names_adapter(model: Any) -> bool:
    """Whether a request's model has the form NAME@SCALE."""
    return isinstance(model, str) and MODEL.fullmatch(model) is not None


def adapter_below(root: str, model: str) -> Arm | None:
    """The arm that `NAME@SCALE` means: a real directory directly below `root`, nothing through links; None for anything else."""
    match = MODEL.fullmatch(model)
    if not match:
        return None
    path = Path(root).resolve() / match[1]
    if path.is_symlink() or not path.is_dir() or path.resolve().parent != Path(root).resolve():
        return None
    try:
        return Arm("adapter", "lora", str(path), quantised(match[2], model))
    except InputError:
        return None


class SkuResolver(LoRAResolver):
    """Keeps at most as many adapters as slots are free beside the arms', one always staying empty; the least recent idle one makes room."""

    def __init__(self, runtime: "Runtime") -> None:
        self.runtime = runtime
        self.lock = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        config = self.runtime.config
        arm = adapter_below(config.adapter_root or "", lora_name) if config.adapter_root else None
        if arm is None:
            return None
        async with self.lock:
            try:
                negation = await asyncio.to_thread(
                    materialise, arm, config.model, self.runtime.directory / "resolved", revision=config.revision, any_base=config.any_base
                )
            except InputError as error:
                self.runtime.log_failure("adapter", error)
                return None
            if negation.rank > int(self.runtime.args.max_lora_rank) or not await self._room():
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(negation.path))  # vLLM gives it an id of its own

    async def _room(self) -> bool:
        arms = sum(served.lora_id > 0 for served in self.runtime.table.arms.values())
        free = self.runtime.args.max_loras - 1 - arms
        for name, request in self.runtime.resolved().items():
            if len(self.runtime.resolved()) < free:
                break
            if not self.runtime.in_flight[request.lora_int_id]:
                del self.runtime.models.lora_requests[name]
                await self.runtime.engine.remove_lora(request.lora_int_id)
        return len(self.runtime.resolved()) < free


def install(runtime: "Runtime") -> None:
    """Offer the resolver to vLLM, which looks when it builds its list of models."""
    LoRAResolverRegistry.register_resolver("sku", SkuResolver(runtime))
