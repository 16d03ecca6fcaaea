"""The one door to the model: every generation passes here, gets its arm's adapter, and is measured.

vLLM's handlers see only the alias. The arm travels in a context variable that the middleware sets, and the adapter is put
into the engine's request here, so no response names an arm and no endpoint, present or future, reaches the original
weights without having been routed.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMClientError, VLLMValidationError

from sku_vllm.judges import Exchange
from sku_vllm.serving.releases import GracefulHTTPError

if TYPE_CHECKING:
    from sku_vllm.serving.runtime import Runtime


@dataclass(slots=True)
class Route:
    """Where one HTTP request goes. lora: its arm's adapter in the engine, None for the engine's own weights.
    resolved: the client named an adapter below the root, and vLLM brings it. beam: every step of the search is a generation of its
    own, so the middleware observes the answer instead.
    """

    arm: str
    lora: Any
    prompts: list[str]
    arrived: float
    resolved: bool = False
    beam: bool = False
    generations: int = 0

    @property
    def version(self) -> int:
        return self.lora.lora_int_id if self.lora else 0


ROUTE: ContextVar[Route | None] = ContextVar("sku_route", default=None)


def wrap_generate(engine_client: Any, runtime: "Runtime") -> Any:
    """Replace `engine_client.generate` on the instance. Returns the original, for probes that belong to no request."""
    inner = engine_client.generate

    async def generate(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
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
        index, route.generations = route.generations, route.generations + 1
        seen = Observation(route, index, sampling_params)
        lora = kwargs.get("lora_request") if route.resolved else route.lora
        if route.resolved and lora is None:
            raise GracefulHTTPError("this model did not resolve to an adapter", HTTPStatus.NOT_FOUND)
        version = lora.lora_int_id if lora else 0
        runtime.in_flight[version] += 1  # beside the HTTP request's own count: a background response outlives its request
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
            raise GracefulHTTPError(f"arm {route.arm!r} failed; try again later", HTTPStatus.SERVICE_UNAVAILABLE) from error
        finally:
            runtime.in_flight[version] -= 1
            if not route.beam:
                seen.finish(runtime)

    engine_client.generate = generate
    return inner


@dataclass(slots=True)
class Observation:
    """What one engine request did, taken from its outputs as they pass. Handles streamed deltas and final-only outputs, any n."""

    route: Route
    index: int
    params: Any
    outcome: str = "error"
    prompt_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    queued: float | None = None
    decode: float | None = None
    texts: dict[int, list[str]] = field(default_factory=dict)
    arrived: dict[int, tuple[int, float]] = field(default_factory=dict)  # by choice: tokens so far, and when the last one came
    gaps: list[float] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    failed: bool = False

    def add(self, output: Any) -> None:
        self.last = time.perf_counter()
        if self.prompt_tokens == 0 and output.prompt_token_ids:
            self.prompt_tokens = len(output.prompt_token_ids)
        cumulative = getattr(getattr(self.params, "output_kind", None), "name", "") == "CUMULATIVE"
        for choice in output.outputs:
            before, then = self.arrived.get(choice.index, (0, 0.0))
            new = len(choice.token_ids) - before if cumulative else len(choice.token_ids)
            if new > 0:
                self.first = self.first or self.last
                self.arrived[choice.index] = before + new, self.last
                self.tokens += new
                if before:
                    self.gaps += [(self.last - then) / new] * new
            if cumulative:
                self.texts[choice.index] = [choice.text]
            else:
                self.texts.setdefault(choice.index, []).append(choice.text)
            if choice.finish_reason in ("stop", "length"):
                self.finished.add(choice.index)
            self.failed = self.failed or choice.finish_reason == "error"
        self._engine_times(getattr(output, "metrics", None))

    def _engine_times(self, stats: Any) -> None:
        """vLLM's own clock where it has one: a final-only output arrives at the end, so our first sight is not its first token."""
        if stats is None or not getattr(stats, "first_token_ts", 0):
            return
        self.queued = max(0.0, stats.scheduled_ts - stats.queued_ts)
        self.decode = max(0.0, stats.last_token_ts - stats.first_token_ts)

    def finish(self, runtime: "Runtime") -> None:
        """Count, time, and offer finished answers to the judge."""
        arm, metrics = self.route.arm, runtime.metrics
        metrics.requests.labels(arm, self.outcome).inc()
        metrics.prompt_tokens.labels(arm).inc(self.prompt_tokens)
        metrics.generation_tokens.labels(arm).inc(self.tokens)
        if self.first is not None and self.outcome == "ok":
            self._time(runtime)
        if self.outcome == "ok":
            prompts = self.route.prompts
            prompt = prompts[self.index] if self.index < len(prompts) else (prompts[-1] if prompts else "")
            for choice in sorted(self.finished):
                runtime.judge.offer(arm, Exchange(prompt, "".join(self.texts[choice])), self.route.version)

    def _time(self, runtime: "Runtime") -> None:
        arm, metrics = self.route.arm, runtime.metrics
        latency = self.last - self.route.arrived
        decode = self.decode if self.decode is not None else self.last - (self.first or self.last)
        first = min((self.first or self.last) - self.route.arrived, max(0.0, latency - decode))
        metrics.latency.labels(arm).observe(latency)
        metrics.first_token.labels(arm).observe(first)
        metrics.decode.labels(arm).observe(decode)
        if self.queued is not None:
            metrics.queue.labels(arm).observe(self.queued)
        for gap in self._all_gaps(decode):
            metrics.between_tokens.labels(arm).observe(gap)
        runtime.experiment.timed(arm, latency, first)

    def _all_gaps(self, decode: float) -> list[float]:
        """Seconds before every token but each choice's first, as vLLM counts them; tokens that reached us together share their time."""
        choices = max(1, len(self.texts))
        together = self.tokens - choices - len(self.gaps)
        if together <= 0:
            return self.gaps
        return [*self.gaps, *[max(0.0, decode * choices - sum(self.gaps)) / together] * together]
