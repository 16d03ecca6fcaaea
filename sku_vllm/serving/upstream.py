"""Forwards requests of an `upstream:` arm to another OpenAI-compatible server, for instance one that serves the fused weights.

Such a server needs no LoRA, which slows every request of an engine.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from sku_vllm.serving.arms import Arm
from sku_vllm.serving.json_answer import JsonAnswer, failed, hidden, renamed
from sku_vllm.serving.route import Route
from sku_vllm.serving.runtime import Runtime

TRACE = ("traceparent", "tracestate", "x-request-id")  # passed on, so that one trace shows both servers
VIA = "x-sku-via"  # the servers that have sent a request on, to notice one that comes back
# The arm's key or model is wrong: nothing that this server's client did, so the arm has failed.
ARMS_OWN = (401, 403, 404, 407)
PASSED_BACK = ("content-type", "retry-after")


class UpstreamFailed(Exception):
    """The other server could not be reached or failed; the client gets 503, never another arm's answer."""


async def forward(
    runtime: Runtime, arm: Arm, path: str, payload: dict[str, Any], route: Route, connection: tuple[Scope, Receive, Send]
) -> None:
    """Forward the request, stream the answer back with the alias as its model, and measure it as answers of this engine are.

    path: what follows the server's root, such as /v1/responses. connection: the request's scope, receive and send.

    Raises:
        UpstreamFailed: before anything was sent to the client.
    """
    scope, receive, send = connection
    route.generations += 1
    relay = Relay(runtime, arm, payload, route)
    answer = asyncio.ensure_future(relay.run(path, Headers(scope=scope), send))
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
        else:
            relay.outcome = "cancelled"
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        relay.answer.finish(runtime, relay.outcome)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def forwarded_headers(runtime: Runtime, arm: str, received: Headers) -> dict[str, str]:
    """Headers for the other server: those of the trace, the arm's own key, and this server's mark. The client's key is not among them.

    Raises:
        UpstreamFailed: the request has passed through this server before.
    """
    via = received.get(VIA, "")
    if runtime.mark in via.split(","):
        raise UpstreamFailed(f"arm {arm!r}: its server sends requests back to this one")
    key = runtime.upstream_keys.get(arm)
    return {
        **{name: received[name] for name in TRACE if name in received},
        **({"authorization": f"Bearer {key}"} if key else {}),
        VIA: f"{via},{runtime.mark}".lstrip(","),
    }


class Relay:
    """One forwarded request. outcome: as in `sku_requests_total`, once it has run."""

    def __init__(self, runtime: Runtime, arm: Arm, payload: dict[str, Any], route: Route) -> None:
        self.runtime, self.arm, self.alias, self.outcome = runtime, arm, runtime.aliases[0], "error"
        self.answer = JsonAnswer(route, payload.get("n"))
        self.body = {**payload, "model": arm.model}
        self.session = runtime.session()
        self.hide_usage = False
        self.started = False

    def ask_for_usage(self) -> None:
        """Let a stream end with its token counts, as the engine counts every token; the client gets them only if it asked too."""
        options = self.body.get("stream_options") or {}
        if self.body.get("stream") is True and isinstance(options, dict) and not options.get("include_usage"):
            self.hide_usage = True
            self.body["stream_options"] = {**options, "include_usage": True}

    async def run(self, path: str, received: Headers, send: Send) -> None:
        """Send the request and pass the answer on. Raises UpstreamFailed while nothing was passed on, afterwards ConnectionError."""
        import aiohttp

        headers = forwarded_headers(self.runtime, self.arm.name, received)
        if path in ("/v1/chat/completions", "/v1/completions"):
            self.ask_for_usage()
        # An arm's URL ends where the other server's API begins, usually in /v1; the routes beside /v1 are beside that.
        root = self.arm.source if path.startswith("/v1/") else self.arm.source.removesuffix("/v1")
        try:
            async with self.session.post(root + path.removeprefix("/v1"), json=self.body, headers=headers) as response:
                await self._pass_on(response, send)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            self.outcome = "error"
            if self.started:  # part of the answer was sent, so its status cannot change any more; closing the connection signals the error
                raise ConnectionError(f"arm {self.arm.name!r}: its server broke off") from None
            raise UpstreamFailed(f"arm {self.arm.name!r}: its server cannot be reached") from error

    async def _pass_on(self, response: Any, send: Send) -> None:
        if response.status >= 500 or response.status in ARMS_OWN:
            raise UpstreamFailed(f"arm {self.arm.name!r}: its server answered {response.status}")
        headers = [(name.encode(), response.headers[name].encode()) for name in PASSED_BACK if name in response.headers]
        streamed = "event-stream" in response.headers.get("content-type", "")
        self.started = True
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        if streamed:
            async for line in lines(response.content.iter_any()):
                await send({"type": "http.response.body", "body": self.line(line), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "http.response.body", "body": self.whole(await response.read(), response.status)})
        self.outcome = "ok" if response.status < 400 else "rejected"

    def whole(self, body: bytes, status: int) -> bytes:
        """An answer in one piece, under the alias."""
        value = _object(body)
        if status >= 400:  # a message about a model that the client has never heard of
            told = body.decode("utf-8", "replace") if value is None else value
            told = hidden(told, self.arm.model, self.alias)
            return (told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)).encode()
        if value is None:
            return body
        self.answer.note(value)
        return json.dumps(renamed(value, self.alias), ensure_ascii=False).encode()

    def line(self, line: bytes) -> bytes:
        """One line of a stream, under the alias; b"" for one that only holds token counts which the client did not ask for."""
        data = line.removeprefix(b"data:")
        value = _object(data) if data != line else None
        if value is None:
            return line
        self.answer.note(value)
        if self.hide_usage and "usage" in value:
            if not value.get("choices"):
                return b""
            del value["usage"]
        if failed(value):
            value = hidden(value, self.arm.model, self.alias)
        return b"data: " + json.dumps(renamed(value, self.alias), ensure_ascii=False).encode() + b"\n"


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream, of any length, each with its line feed."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r") + b"\n"
    if rest:
        yield rest


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
