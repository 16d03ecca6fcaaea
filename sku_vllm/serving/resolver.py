"""--adapter-root: a trusted client may name `NAME@SCALE` as the model and gets base − SCALE·delta of ROOT/NAME.

vLLM asks a resolver for adapters it does not know, but only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. The middleware lets only
trusted clients name such a model.
"""

import asyncio

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from sku_vllm.errors import InputError
from sku_vllm.serving.adapter_name import adapter_below
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.vllm_flags import too_high


class SkuResolver(LoRAResolver):
    """Writes the negated adapter and makes room for it in the engine.

    The arms' adapters keep their slots and one slot stays empty; of the others the adapter that was loaded first and is not in use
    is unloaded.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.lock = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request that loads adapter `lora_name`; None if it is not below the root, has too high a rank, or no slot is free."""
        root = self.runtime.config.adapter_root
        arm = adapter_below(root, lora_name) if root else None
        if arm is None:
            return None
        async with self.lock:
            try:
                adapter = await self.runtime.write_adapter(arm, "resolved")
            except InputError as error:
                self.runtime.log_failure("adapter", error)
                return None
            limit = self.runtime.args.max_lora_rank
            if adapter.rank > int(limit):
                self.runtime.log_failure("adapter", too_high(arm, adapter.rank, limit))
                return None
            if not await self._room():
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(adapter.path))  # vLLM gives it an id of its own

    async def _room(self) -> bool:
        arms = sum(served.lora_id > 0 for served in self.runtime.table.arms.values())
        free: int = self.runtime.args.max_loras - 1 - arms
        for name, request in self.runtime.resolved().items():
            if len(self.runtime.resolved()) < free:
                break
            if not self.runtime.in_flight[request.lora_int_id]:
                del self.runtime.models.lora_requests[name]
                await self.runtime.engine.remove_lora(request.lora_int_id)
        return len(self.runtime.resolved()) < free


def install(runtime: Runtime) -> None:
    """Register the resolver. It must happen before vLLM builds its list of models, when it collects the resolvers."""
    LoRAResolverRegistry.register_resolver("sku", SkuResolver(runtime))
