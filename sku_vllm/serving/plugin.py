"""The three plugins that vLLM loads, all under the name `sku`: VLLM_PLUGINS=sku switches them on.

`register` runs in every process, `SkuEndpointPlugin` in the API servers, `SkuStatLogger` beside vLLM's own stat loggers.
vLLM reads the entry points of every installed plugin at every start, so this module imports heavy packages only inside functions.
"""

import os
from argparse import Namespace
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from sku_vllm.serving.serve_config import VARIABLE, read_config


def register() -> None:
    """General plugin, called in every process. On CPU it replaces one compiled function of vLLM's sampler by the uncompiled one.

    Otherwise torch.compile stalls the engine for 10-20 s at the first request for log-probabilities, such as a swap's probe. The
    function counts ranks in one line and gives the same result uncompiled; vLLM compiles it to save memory on GPUs. Does nothing
    where SKU_SERVE_CONFIG is not set, but for a server whose VLLM_PLUGINS names `sku`: that is told so (`by_hand.py`).
    """
    from sku_vllm.serving.by_hand import check_before_engine, wanted

    if wanted():
        check_before_engine()
    if VARIABLE not in os.environ:
        return
    from vllm.platforms import current_platform

    from sku_vllm.serving.private_directory import hold_rendezvous

    hold_rendezvous()
    if current_platform.is_cpu():
        from vllm.v1.sample import sampler

        plain = getattr(getattr(sampler, "batched_count_greater_than", None), "_torchdynamo_orig_callable", None)
        if plain is not None:
            sampler.batched_count_greater_than = plain  # type: ignore[attr-defined]  # sampler imports it for itself


class SkuEndpointPlugin:
    """Endpoint plugin: vLLM calls `attach_router` while it builds the app, and `init_state` once the engine runs."""

    name = "sku"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.app: Any = None
        self.runtime: Any = None

    def attach_router(self, app: Any) -> None:
        """Put the middleware before vLLM's routes, and the control API beside them."""
        from sku_vllm.serving.control import Control, router
        from sku_vllm.serving.middleware import SkuMiddleware
        from sku_vllm.serving.runtime import Runtime

        self.app, self.runtime = app, Runtime(read_config())
        app.root_path = (app.root_path or "").rstrip("/")  # after a "/" no route would be found, and no --api-key asked for
        if self.runtime.config.adapter_root:
            from sku_vllm.serving.resolver import install

            install(self.runtime)
        app.add_middleware(SkuMiddleware, runtime=self.runtime)
        self.control = Control(self.runtime)
        app.include_router(router(self.control))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Wrap the engine's `generate`, so that only routed requests reach it, load the arms, and open the routes that need no key."""
        from sku_vllm.serving.engine import wrap_generate
        from sku_vllm.serving.follower import Follower
        from sku_vllm.serving.open_routes import put_outermost
        from sku_vllm.serving.shutdown import answer_before_shutdown
        from sku_vllm.serving.spans import describe_spans

        put_outermost(self.app, self.runtime)
        describe_spans()
        await self.runtime.start(engine_client, wrap_generate(engine_client, self.runtime), state.openai_serving_models, args)
        answer_before_shutdown(engine_client, self.runtime)
        if self.runtime.config.follow:
            self.follower = Follower(self.runtime, self.control.changes)
            self.follower.start()


class SkuStatLogger(StatLoggerBase):
    """Keeps vLLM's per-request timings on, even under --disable-log-stats.

    When a stat logger plugin is installed, the engine fills `RequestOutput.metrics`, from which the arms' queue, decode and
    first-token times are taken. It logs nothing itself.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0, **kwargs: Any) -> None:
        self.engine_index = engine_index

    def record(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, engine_idx: int = 0, **kwargs: Any
    ) -> None:
        """Does nothing: these statistics do not say which adapter a request used, so they cannot be split by arm."""

    def log_engine_initialized(self) -> None:
        """Does nothing."""
