"""The three doors into vLLM, all called `sku`: VLLM_PLUGINS=sku opens them.

`register` runs in every process, `SkuEndpointPlugin` in the API servers, `SkuStatLogger` beside vLLM's own stat loggers.
vLLM reads the entry points of every installed plugin at start, so this module's top level stays light.
"""

import os
from argparse import Namespace
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from sku_vllm.serving.config import VARIABLE, read_config


def register() -> None:
    """General plugin, in every process: keeps a CPU engine from stopping 10-20 s for a torch.compile at the first request for
    log-probabilities, which our swap's probe is. Leaves a server alone that was given no SKU configuration.

    What vLLM compiles is a one-line rank count, to save memory on GPUs; the uncompiled function is the same arithmetic.
    """
    if VARIABLE not in os.environ:
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample import sampler

        plain = getattr(getattr(sampler, "batched_count_greater_than", None), "_torchdynamo_orig_callable", None)
        if plain is not None:
            sampler.batched_count_greater_than = plain


class SkuEndpointPlugin:
    """Endpoint plugin: middleware and control routes first, the engine's arms when the engine is there."""

    name = "sku"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.runtime: Any = None

    def attach_router(self, app: Any) -> None:
        from sku_vllm.serving.control import router
        from sku_vllm.serving.middleware import SkuMiddleware
        from sku_vllm.serving.runtime import Runtime

        self.runtime = Runtime(read_config())
        if self.runtime.config.adapter_root:
            from sku_vllm.serving.resolver import install

            install(self.runtime)
        app.add_middleware(SkuMiddleware, runtime=self.runtime)
        app.include_router(router(self.runtime))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        await self.runtime.start(engine_client, state.openai_serving_models, args)


class SkuStatLogger(StatLoggerBase):
    """Keeps vLLM's per-request timings switched on, even under --disable-log-stats: with a plugin logger present the engine
    fills `RequestOutput.metrics`, from which queue, decode and first-token times per arm are taken.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0, **kwargs: Any) -> None:
        self.engine_index = engine_index

    def record(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, engine_idx: int = 0, **kwargs: Any
    ) -> None:
        """Nothing to add: finished requests carry no adapter name here."""

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
