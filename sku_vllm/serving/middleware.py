"""Raw ASGI: reads the request's key and model, decides the arm, adds the header. Everything else passes through untouched."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sku_vllm.serving.arms import ALIAS
from sku_vllm.serving.body import never, parse_object, prompts_of, read_body, replaced_body, replay, respond
from sku_vllm.serving.engine import ROUTE, Observation, Route
from sku_vllm.serving.resolver import names_adapter
from sku_vllm.serving.runtime import Runtime, Unavailable, effective_split, lora_request
from sku_vllm.serving.upstream import UpstreamFailed, forward, observe

# Endpoints that generate from a JSON body with a `model`. Any other endpoint that generates is refused at the engine.
GENERATES = frozenset({
    "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages",
    "/inference/v1/generate", "/generative_scoring", "/invocations",
})

# vLLM's own runtime loading, where it is switched on: any path of this machine, so not for every client.
LOADS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Replays under way at once; beyond that a sampled request is simply not replayed.
SHADOWS = 16


class SkuMiddleware:
    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app, self.runtime = app, runtime
        self.shadows: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path == "/v1/models":
            self.runtime.list_models()
        if path in LOADS and not self.runtime.token_valid(Headers(scope=scope).get("x-sku-token")):
            return await respond(send, 403, "loading adapters needs X-SKU-Token")
        if scope["type"] != "http" or scope["method"] != "POST" or path not in GENERATES:
            return await self.app(scope, receive, send)
        arrived = time.perf_counter()
        body, receive = await read_body(receive)
        payload = parse_object(body)
        if payload is None:  # vLLM's own 400
            return await self.app(scope, receive, send)
        await self.runtime.gate.wait()
        headers = Headers(scope=scope)
        if self.runtime.config.adapter_root and names_adapter(payload.get("model")) and self.runtime.trusted(headers.get("x-sku-token")):
            if self.runtime.table.swap:
                return await respond(send, 409, "adapters cannot answer while a whole-model swap is in force; restore first")
            route = Route("adapter", None, prompts_of(payload), arrived, resolved=True)
            with self.runtime.busy(0):
                return await self.pass_on(scope, receive, send, route)
        try:
            arm = self.decide(headers, payload)
            if arm is None:  # a model vLLM does not know either: its own 404
                return await self.app(scope, receive, send)
            await self.answer(arm, payload, path, scope, receive, send, arrived)
        except Unavailable as error:
            if error.arm:
                self.runtime.metrics.requests.labels(error.arm, "error" if error.status >= 500 else "rejected").inc()
            return await respond(send, error.status, str(error))
        shadow = self.shadow(arm)
        if shadow:
            self.replay(shadow, payload, path, scope)

    async def answer(
        self, arm: str, payload: dict[str, Any], path: str, scope: Scope, receive: Receive, send: Send, arrived: float
    ) -> None:
        """One request by one arm, whichever engine runs it. Raises Unavailable before anything was sent."""
        with self.runtime.hold(arm) as served:
            lora = lora_request(served) if served.lora_id else None
            route = Route(arm, lora, prompts_of(payload), arrived, beam=payload.get("use_beam_search") is True)
            if not served.arm.on_engine:
                try:
                    return await forward(self.runtime, served.arm, path, payload, route, receive, self.marked(send, arm))
                except UpstreamFailed as error:
                    self.runtime.log_failure(arm, error)
                    raise Unavailable(503, str(error)) from error  # already counted, with its time
            if payload.get("model") != ALIAS:
                scope, receive = replaced_body(scope, receive, json.dumps({**payload, "model": ALIAS}).encode())
            await self.pass_on(scope, receive, send, route)

    def shadow(self, answered_by: str) -> str | None:
        """The arm this request is replayed to, for a sample of requests that another arm answered."""
        if not self.runtime.config.shadow or len(self.shadows) >= SHADOWS:
            return None
        name, share = self.runtime.config.parsed_shadow()
        return name if name != answered_by and random.random() < share else None

    def replay(self, arm: str, payload: dict[str, Any], path: str, scope: Scope) -> None:
        """Answer again, to nobody: the judge sees it, the client is not kept waiting."""
        body = json.dumps({**payload, "model": ALIAS, "stream": False, "stream_options": None}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

        async def nowhere(message: Message) -> None:
            return None

        async def run() -> None:
            with contextlib.suppress(Unavailable):
                fresh = {**scope, "headers": headers, "state": dict(scope.get("state", {}))}
                await self.answer(arm, {**json.loads(body)}, path, fresh, replay(body, never), nowhere, time.perf_counter())

        task = asyncio.create_task(run())
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    def marked(self, send: Send, arm: str) -> Send:
        """`send` that adds X-SKU-Arm, unless the server is blind."""

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start" and not self.runtime.config.blind:
                MutableHeaders(scope=message).append("x-sku-arm", arm)
            await send(message)

        return send_marked

    def decide(self, headers: Headers, payload: Mapping[str, Any]) -> str | None:
        """The arm's name; None when the request names something else than the alias or an arm it may choose.

        Raises:
            Unavailable: 403 for a choice that is not this client's, 400 for an arm that is not there.
        """
        runtime, named, model = self.runtime, headers.get("x-sku-arm"), payload.get("model")
        if named is None and (not model or model == ALIAS):
            return runtime.choose(headers.get("x-sku-key"))
        table = runtime.table
        arms = {**table.arms, **effective_split(table)}  # and `swapped`, while it is in force
        trusted = runtime.trusted(headers.get("x-sku-token"))
        if named is None:
            return model if isinstance(model, str) and model in arms and trusted else None
        if not trusted:
            raise Unavailable(403, "clients of this server cannot choose an arm; leave X-SKU-Arm out, or send a valid X-SKU-Token")
        if named not in arms:
            raise Unavailable(400, f"unknown arm {named!r}; the arms are {', '.join(arms)}")
        return named

    async def pass_on(self, scope: Scope, receive: Receive, send: Send, route: Route) -> None:
        status, body = 0, bytearray()
        marked = self.marked(send, route.arm)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif route.beam:
                body.extend(message.get("body", b""))
            await marked(message)

        token = ROUTE.set(route)
        try:
            await self.app(scope, receive, noted)
        finally:
            ROUTE.reset(token)
            outcome = "ok" if status == 200 else "cancelled" if status == 0 else "error" if status >= 500 else "rejected"
            if route.generations == 0:
                self.runtime.metrics.requests.labels(route.arm, outcome).inc()
            elif route.beam:
                seen = Observation(route, 0, None, outcome)
                observe(parse_object(bytes(body)) or {}, seen)
                seen.finish(self.runtime)
