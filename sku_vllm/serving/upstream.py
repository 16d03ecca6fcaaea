"""An arm that another OpenAI-compatible server answers: fused weights in their own engine, without the LoRA bias."""

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Send

from sku_vllm.serving.arms import ALIAS, Arm
from sku_vllm.serving.engine import Observation, Route

if TYPE_CHECKING:
    from sku_vllm.serving.runtime import Runtime


class UpstreamFailed(Exception):
    """The other server could not be reached or failed; the client gets 503, never another arm's answer."""


async def forward(runtime: "Runtime", arm: Arm, path: str, payload: dict[str, Any], route: Route, receive: Receive, send: Send) -> None:
    """Send the request on, stream the answer back under the alias's name, observe it like an engine's own.

    Raises:
        UpstreamFailed: before anything was sent to the client.
    """
    route.generations += 1
    seen = Observation(route, 0, None)
    answer = asyncio.ensure_future(_relay(runtime, arm, path, payload, seen, send))
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
        else:
            seen.outcome = "cancelled"
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        seen.finish(runtime)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _relay(runtime: "Runtime", arm: Arm, path: str, payload: dict[str, Any], seen: Observation, send: Send) -> None:
    import aiohttp

    url = arm.source + path.removeprefix("/v1")
    started = False
    try:
        session = runtime.session()
        async with session.post(url, json={**payload, "model": arm.model}) as response:
            if response.status >= 500:
                raise UpstreamFailed(f"arm {arm.name!r}: its server answered {response.status}")
            kind = response.headers.get("content-type", "application/json")
            started = True
            await send({"type": "http.response.start", "status": response.status, "headers": [(b"content-type", kind.encode())]})
            if "event-stream" in kind:
                async for line in response.content:
                    await send({"type": "http.response.body", "body": _rename_line(line, seen), "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            else:
                await send({"type": "http.response.body", "body": _rename(await response.read(), seen)})
            seen.outcome = "ok" if response.status < 400 else "rejected"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        if started:  # half an answer is out; closing the connection is the only honest end
            raise ConnectionError(f"arm {arm.name!r}: its server broke off") from None
        raise UpstreamFailed(f"arm {arm.name!r}: its server cannot be reached") from error


def _rename_line(line: bytes, seen: Observation) -> bytes:
    if not line.startswith(b"data: {"):
        return line
    return b"data: " + _rename(line[6:], seen) + b"\n"


def _rename(body: bytes, seen: Observation) -> bytes:
    """The same JSON under the alias's name, its text noted on the way."""
    try:
        value = json.loads(body)
    except ValueError:
        return body
    if not isinstance(value, dict):
        return body
    observe(value, seen)
    if "model" in value:
        value["model"] = ALIAS
    return json.dumps(value, ensure_ascii=False).encode()


def observe(value: dict[str, Any], seen: Observation) -> None:
    """Text, token counts and times of one completion object or chunk, whichever API it belongs to."""
    seen.last = time.perf_counter()
    for choice in value.get("choices") or []:
        said = choice.get("message") or choice.get("delta") or {}
        text = said.get("content") or choice.get("text") or ""
        if text:
            seen.first = seen.first or seen.last
            seen.texts.setdefault(choice.get("index", 0), []).append(text)
            seen.tokens += 1
        if choice.get("finish_reason") in ("stop", "length"):
            seen.texts.setdefault(choice.get("index", 0), [])
            seen.finished.add(choice.get("index", 0))
    usage = value.get("usage")
    if usage:
        seen.prompt_tokens = usage.get("prompt_tokens") or 0
        seen.tokens = usage.get("completion_tokens") or seen.tokens
