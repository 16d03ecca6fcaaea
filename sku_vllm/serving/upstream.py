"""Forwards requests of an `upstream:` arm to another OpenAI-compatible server, for instance one that serves the fused weights.

Such a server needs no LoRA, which slows every request of an engine.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from sku_vllm.serving.arms import Arm
from sku_vllm.serving.event_stream import data_of, encoded, events, with_data
from sku_vllm.serving.json_answer import JsonAnswer, failed, hidden, renamed
from sku_vllm.serving.route import Route
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.traffic import CLOSED

TRACE = ("traceparent", "tracestate", "x-request-id")  # passed on, so that one trace shows both servers
VIA = "x-sku-via"  # the servers that have sent a request on, to notice one that comes back
# The arm's key or model is wrong: nothing that this server's client did, so the arm has failed.
ARMS_OWN = (401, 403, 404, 407)
PASSED_BACK = ("content-type", "retry-after")


class UpstreamFailed(Exception):
    """The other server could not be reached or failed; the client gets 503, never another arm's answer."""


class BrokenOff(ConnectionError):
    """The other server failed after part of its answer had been sent on; closing the connection tells the client."""


async def forward(
    runtime: Runtime, arm: Arm, path: str, payload: dict[str, Any], route: Route, connection: tuple[Scope, Receive, Send]
) -> None:
    """Forward the request, stream the answer back with the alias as its model, and measure it as answers of this engine are.

    path: what follows the server's root, such as /v1/responses. connection: the request's scope, receive and send.

    Raises:
        UpstreamFailed: before anything was sent to the client. BrokenOff: afterwards.
    """
    scope, receive, send = connection
    route.generations += 1
    relay = Relay(runtime, arm, payload, route)
    answer = asyncio.create_task(relay.run(path, Headers(scope=scope), send))
    gone = asyncio.create_task(_disconnected(receive))
    runtime.relays.add(answer)
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.cancelled():  # by `fail_unanswered`
            relay.fail(CLOSED)
        elif answer.done():
            answer.result()
        else:
            relay.outcome = "cancelled"
    finally:
        runtime.relays.discard(answer)
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

    def adapt(self, path: str) -> None:
        """Ask for what this server needs to judge and count the answer as the engine's are."""
        options = self.body.get("stream_options") or {}
        chat = path in ("/v1/chat/completions", "/v1/completions")
        if chat and self.body.get("stream") is True and isinstance(options, dict) and not options.get("include_usage"):
            self.hide_usage = True  # the client gets the counts only if it asked for them too
            self.body["stream_options"] = {**options, "include_usage": True}
        if path == "/v1/responses" and self.body.get("background"):
            self.body["background"] = False  # its answer could not be fetched from here, and nobody would judge it

    def fail(self, reason: str) -> None:
        """Raise UpstreamFailed while nothing was passed on; afterwards BrokenOff, since the status cannot change any more."""
        self.outcome = "error"
        if self.started:
            raise BrokenOff(reason)
        raise UpstreamFailed(reason)

    async def run(self, path: str, received: Headers, send: Send) -> None:
        """Send the request and pass the answer on. Raises as `fail`."""
        import aiohttp

        headers = forwarded_headers(self.runtime, self.arm.name, received)
        self.adapt(path)
        # An arm's URL ends where the other server's API begins, usually in /v1; the routes beside /v1 are beside that.
        root = self.arm.source if path.startswith("/v1/") else self.arm.source.removesuffix("/v1")
        try:
            async with self.session.post(root + path.removeprefix("/v1"), json=self.body, headers=headers) as response:
                await self._pass_on(response, send)
        except BrokenOff:
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            why = "broke off" if self.started else f"cannot be reached ({type(error).__name__})"
            self.fail(f"arm {self.arm.name!r}: its server {why}")

    async def _pass_on(self, response: Any, send: Send) -> None:
        # What a response goes on from is known to the server that gave it: the client's to say rightly, or to stay with by its key.
        clients_own = response.status == 404 and self.body.get("previous_response_id")
        if response.status >= 500 or (response.status in ARMS_OWN and not clients_own):
            hint = "; does its URL end in /v1, and does it serve this model?" if response.status == 404 else ""
            self.fail(f"arm {self.arm.name!r}: its server answered {response.status}{hint}")
        headers = [(name.encode(), response.headers[name].encode()) for name in PASSED_BACK if name in response.headers]
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        if self._streams(response):
            self.started = True
            await send(start)
            async for lines, end in events(response.content.iter_any()):
                await send({"type": "http.response.body", "body": self.event(lines, end), "more_body": True})
            if not self.answer.broken and self.answer.cut_off():
                self.fail(f"arm {self.arm.name!r}: its server ended in the middle of its answer")
            await send({"type": "http.response.body", "body": b""})
        else:
            body = self.whole(await response.read(), response.status)
            self.started = True
            await send(start)
            await send({"type": "http.response.body", "body": body})
        self.outcome = "ok" if response.status < 400 else "rejected"

    def _streams(self, response: Any) -> bool:
        """Whether an answer is a stream of events: it says so, or it was asked for one and says nothing else."""
        kind = response.headers.get("content-type", "").casefold()
        asked = self.body.get("stream") is True and response.status < 400
        return "event-stream" in kind or (asked and "json" not in kind and "html" not in kind)

    def whole(self, body: bytes, status: int) -> bytes:
        """An answer in one piece, under the alias. Raises UpstreamFailed where an answer is none of these APIs'."""
        value = parsed(body)
        if status >= 400:  # a message about a model that the client has never heard of
            told = hidden(body.decode("utf-8", "replace") if value is None else value, self.arm.model, self.alias)
            return told.encode() if isinstance(told, str) else dumped(told)
        if value is None:
            self.fail(f"arm {self.arm.name!r}: its server's answer is no JSON; is its URL that of an API?")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                self.answer.note(each)
        self.answer.complete()
        return dumped(renamed(hidden(value, self.arm.model, self.alias) if self.answer.broken else value, self.alias))

    def event(self, lines: Sequence[bytes], end: bytes) -> bytes:
        """One event of a stream, under the alias; b"" for one that only holds token counts which the client did not ask for."""
        data = data_of(lines)
        if data.strip() == b"[DONE]":
            self.answer.complete()
        value = parsed(data)
        if not isinstance(value, dict):
            return encoded(lines, end)
        self.answer.note(value)
        if failed(value):
            value = hidden(value, self.arm.model, self.alias)
        elif self.hide_usage and "usage" in value and value.pop("usage") and not value.get("choices"):
            return b""
        return encoded(with_data(lines, dumped(renamed(value, self.alias))), end)


def parsed(data: bytes) -> Any:
    """A JSON value; None for anything else."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def dumped(value: Any) -> bytes:
    """A JSON value as text. Halves of a surrogate pair stay escaped, as some servers cut one in two: they are no text of their own."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
