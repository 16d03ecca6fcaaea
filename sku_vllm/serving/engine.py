"""Wraps the engine's `generate`, so that every generation gets its arm's adapter and is measured.

vLLM's handlers see only the alias. The middleware stores the arm in a context variable, and the wrapper adds the adapter to the
engine's request. So no response names an arm, and an endpoint that the middleware does not route (such as one that a later vLLM
adds) is refused instead of being answered by the original weights.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError

from sku_vllm.serving.observation import Observation
from sku_vllm.serving.route import ROUTE, Route
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.spans import describing
from sku_vllm.serving.traffic import CLOSED
from sku_vllm.serving.vllm_compat import GracefulHTTPError


def wrap_generate(engine_client: Any, runtime: Runtime) -> Any:
    """Replace `engine_client.generate` on the instance. Returns the original, which probes outside any HTTP request use."""
    inner = engine_client.generate

    async def generate(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        route = _route(runtime, sampling_params)
        index, route.generations = route.generations, route.generations + 1
        seen = Observation(route, index, sampling_params)
        lora = kwargs.get("lora_request") if route.resolved else route.lora
        if route.resolved and lora is None:
            raise GracefulHTTPError("this model did not resolve to an adapter", HTTPStatus.NOT_FOUND)
        # The middleware does so for the HTTP request, but a background response goes on after that.
        with runtime.busy(lora.lora_int_id if lora else 0, route), describing(request_id, route):
            try:
                async with aclosing(inner(prompt, sampling_params, request_id, *args, **{**kwargs, "lora_request": lora})) as outputs:
                    async for output in outputs:
                        seen.add(output)
                        yield output
                seen.outcome = "error" if seen.failed else "ok"
            except (asyncio.CancelledError, GeneratorExit):
                seen.outcome = "cancelled"
                raise
            except (VLLMClientError, GracefulHTTPError, ValueError):
                seen.outcome = "rejected"
                raise
            except Exception as error:
                runtime.log_failure(route.arm, error)
                message = CLOSED if runtime.closing else f"arm {route.arm!r} failed; try again later"
                raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from error
            finally:
                if not route.beam:
                    seen.finish(runtime)

    engine_client.generate = generate
    return inner


def _route(runtime: Runtime, sampling_params: Any) -> Route:
    """The route of the HTTP request that this engine request is made for. Raises vLLM's errors for what must not reach the engine."""
    route = ROUTE.get()
    if route is None:
        raise GracefulHTTPError(
            "this endpoint is not routed by sku, and unrouted requests would reach the original model; "
            "use the alias on /v1/chat/completions or /v1/completions",
            HTTPStatus.FORBIDDEN,
        )
    if getattr(sampling_params, "prompt_logprobs", None) is not None and runtime.fragile:
        raise VLLMValidationError(
            "prompt_logprobs (or echo with logprobs) is off on this server: a LoRA-enabled vLLM on CPU ends when such a request "
            "shares a batch with others"
        )
    return route
