"""The ASGI middleware in front of vLLM's routes: it chooses the arm of each request and names it in the header X-SKU-Arm.

It is plain ASGI, so that requests it does not handle pass through unchanged. Open this file to change which endpoints are routed.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sku_vllm.serving.adapter_name import names_adapter
from sku_vllm.serving.audit import in_force
from sku_vllm.serving.conversations import conversations_of
from sku_vllm.serving.json_answer import JsonAnswer
from sku_vllm.serving.observation import shadow_label
from sku_vllm.serving.request_body import never, parse_object, read_body, replaced_body, replay, respond, route_path
from sku_vllm.serving.route import ROUTE, Route
from sku_vllm.serving.routing import bucket_of, sticky_key
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.traffic import Unavailable, lora_request, versions
from sku_vllm.serving.upstream import VIA, UpstreamFailed, forward

# Endpoints that generate from a JSON body with a `model`. Any other endpoint that generates is refused at the engine.
GENERATES = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
    }
)

# vLLM's own endpoints for loading adapters. They accept any path on this machine, so they need the control token.
LOADS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


@dataclass(slots=True)
class Asked:
    """One request. path: without the server's --root-path. arrived: `time.perf_counter`. shadow: a replay for judging only."""

    payload: dict[str, Any]
    path: str
    arrived: float
    scope: Scope
    bucket: int = 0
    shadow: bool = False


# Headers that a --shadow replay keeps: its trace, and which servers it has passed, so that servers cannot replay to each other for ever.
FOLLOWED = frozenset({VIA, "traceparent", "tracestate"})

# Most --shadow replays at a time; while there are as many, further requests are not replayed.
SHADOWS = 16


class SkuMiddleware:
    """Routes every request that generates to its arm, before vLLM sees it."""

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app, self.runtime = app, runtime
        self.shadows: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if scope["type"] == "http" and path == "/v1/models":
            self.runtime.list_models()
        if scope["type"] == "http" and path in LOADS:
            return await self.load(scope, receive, send)
        if scope["type"] != "http" or scope["method"] != "POST" or path not in GENERATES:
            return await self.app(scope, receive, send)
        arrived = time.perf_counter()
        body, receive = await read_body(receive)
        payload = parse_object(body)
        if payload is None:  # vLLM's own 400
            return await self.app(scope, receive, send)
        await self.runtime.gate.wait()
        try:
            await self.route(Asked(payload, path, arrived, scope), receive, send)
        except Unavailable as error:
            if error.arm:
                self.runtime.metrics.requests.labels(error.arm, "error" if error.status >= 500 else "rejected", "no").inc()
            return await respond(send, error.status, str(error))

    async def load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's own loading of adapters: for a token that may change the server, and with a line in the audit log."""
        runtime, status = self.runtime, 0
        holder = runtime.tokens.holder(Headers(scope=scope).get("x-sku-token"))
        if holder is None or not holder.changes:
            return await respond(send, 403, "loading adapters needs X-SKU-Token")

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self.app(scope, receive, noted)
        force = in_force(runtime.table, runtime.judge.sample)
        runtime.audit.write(holder.name, f"{scope['method']} {route_path(scope)}", force, force, f"answered {status}")

    async def route(self, asked: Asked, receive: Receive, send: Send) -> None:
        """Let the arm that the request names, or that the split chooses, answer it. Raises Unavailable before anything was sent."""
        runtime, headers, model = self.runtime, Headers(scope=asked.scope), asked.payload.get("model")
        if runtime.closing:
            raise Unavailable(503, "this server is shutting down; ask another one")
        key = sticky_key(headers.get("x-sku-key"), asked.payload, runtime.config.sticky_cache_key)
        asked.bucket = bucket_of(key)
        if model not in runtime.aliases and runtime.config.adapter_root and names_adapter(model) and self.trusted(headers):
            runtime.check_engine()
            if runtime.table.swap:
                raise Unavailable(409, "adapters cannot answer while a whole-model swap is in force; restore first")
            route = Route("adapter", str(model), None, conversations_of(asked.payload), asked.arrived, asked.bucket, resolved=True)
            with runtime.busy(0, route):
                return await self.pass_on(asked.scope, receive, send, route)
        arm = self.decide(headers, asked.payload, key)
        if arm is None:  # a model vLLM does not know either: its own 404
            return await self.app(asked.scope, receive, send)
        await self.answer(arm, asked, receive, send)
        shadow = self.shadow(arm)
        if shadow:
            self.replay(shadow, asked)

    async def answer(self, arm: str, asked: Asked, receive: Receive, send: Send) -> None:
        """Let one arm answer a request, on this engine or on another server. Raises Unavailable before anything was sent."""
        served = self.runtime.available(arm)
        lora = lora_request(served) if served.lora_id else None
        conversations, beam = conversations_of(asked.payload), asked.payload.get("use_beam_search") is True
        route = Route(arm, served.version, lora, conversations, asked.arrived, asked.bucket, shadow=asked.shadow, beam=beam)
        with self.runtime.busy(served.lora_id if served.arm.on_engine else None, route):
            if not served.arm.on_engine:
                connection = asked.scope, receive, self.marked(send, arm)
                try:
                    return await forward(self.runtime, served.arm, asked.path, asked.payload, route, connection)
                except UpstreamFailed as error:
                    self.runtime.log_failure(arm, str(error))
                    raise Unavailable(503, str(error)) from error  # already counted, with its time
            scope = asked.scope
            if asked.payload.get("model") not in self.runtime.aliases:
                renamed = json.dumps({**asked.payload, "model": self.runtime.aliases[0]}).encode()
                scope, receive = replaced_body(scope, receive, renamed)
            await self.pass_on(scope, receive, send, route)

    def shadow(self, answered_by: str) -> str | None:
        """The arm that --shadow replays this request to; None when it is not in the sample or that arm has answered it."""
        if not self.runtime.config.shadow or self.runtime.closing or len(self.shadows) >= SHADOWS:
            return None
        name, share = self.runtime.config.parsed_shadow()
        return name if name != answered_by and random.random() < share else None

    def replay(self, arm: str, asked: Asked) -> None:
        """Let another arm answer the same request in the background. Only the judge and the metrics see the answer."""
        payload = {**asked.payload, "model": self.runtime.aliases[0], "stream": False, "stream_options": None}
        body = json.dumps(payload).encode()
        kept = [(name, value) for name, value in asked.scope["headers"] if name.decode("latin-1").lower() in FOLLOWED]
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *kept]

        async def nowhere(message: Message) -> None:
            return None

        async def run() -> None:
            with contextlib.suppress(Unavailable):
                fresh = {**asked.scope, "headers": headers, "state": dict(asked.scope.get("state", {}))}
                again = Asked(json.loads(body), asked.path, time.perf_counter(), fresh, asked.bucket, shadow=True)
                await self.answer(arm, again, replay(body, never), nowhere)

        task = asyncio.create_task(run())
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    def marked(self, send: Send, arm: str) -> Send:
        """`send` with the header X-SKU-Arm added to the response, unless the server was started with --blind."""

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start" and not self.runtime.config.blind:
                MutableHeaders(scope=message).append("x-sku-arm", arm)
            await send(message)

        return send_marked

    def trusted(self, headers: Headers) -> bool:
        """Whether this client may choose its arm."""
        return self.runtime.config.expose_arms or self.runtime.token_valid(headers.get("x-sku-token"))

    def decide(self, headers: Headers, payload: Mapping[str, Any], key: str | None) -> str | None:
        """The name of the arm that answers; None when the request's `model` is neither an alias nor an arm that this client may choose.

        Raises:
            Unavailable: 403 when X-SKU-Arm is sent by a client that may not choose, 400 when there is no such arm.
        """
        runtime, named, model = self.runtime, headers.get("x-sku-arm"), payload.get("model")
        if named is None and (not model or model in runtime.aliases):
            return runtime.choose(key)
        arms = versions(runtime.table)  # includes `swapped` during a whole-model swap
        trusted = self.trusted(headers)
        if named is None:
            return model if isinstance(model, str) and model in arms and trusted else None
        if not trusted:
            raise Unavailable(403, "clients of this server cannot choose an arm; leave X-SKU-Arm out, or send a valid X-SKU-Token")
        if named not in arms:
            raise Unavailable(400, f"unknown arm {named!r}; the arms are {', '.join(arms)}")
        return named

    async def pass_on(self, scope: Scope, receive: Receive, send: Send, route: Route) -> None:
        """Pass the request to vLLM under this route.

        Its outcome is counted here only if no engine request was made for it (rejected, or left by its client, earlier) or if it is a
        beam search.
        """
        status, body, left = 0, bytearray(), False
        marked = self.marked(send, route.arm)

        async def listened() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif route.beam:
                body.extend(message.get("body", b""))
            await marked(message)

        token = ROUTE.set(route)
        try:
            await self.app(scope, listened, noted)
        finally:
            ROUTE.reset(token)
            outcome = "ok" if status == 200 else "cancelled" if status == 0 else "error" if status >= 500 else "rejected"
            if route.generations == 0 and left and status == 200:
                outcome = "cancelled"  # vLLM ends with an empty 200 where the client hung up before the engine was asked
            if route.generations == 0:
                self.runtime.metrics.requests.labels(route.arm, outcome, shadow_label(route.shadow)).inc()
            elif route.beam:
                answer = JsonAnswer(route)
                answer.note(parse_object(bytes(body)) or {})
                answer.finish(self.runtime, outcome)
