"""Request bodies over raw ASGI: read once, replayed, replaced; and the few things we need from them."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send


async def read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that replays it once and then listens on (for disconnects)."""
    parts: list[bytes] = []
    ended: Message | None = None
    while True:
        message = await receive()
        if message["type"] != "http.request":
            ended = message
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = b"".join(parts)
    return body, replay(body, receive, ended)


def replay(body: bytes, receive: Receive, ended: Message | None = None) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    if ended is not None:
        pending = [ended]

    async def again() -> Message:
        return pending.pop(0) if pending else await receive()

    return again


async def never() -> Message:
    """A client that never hangs up."""
    await asyncio.Event().wait()
    raise AssertionError


def replaced_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The same request with another body and a content-length that fits it."""

    async def after_first() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            await receive()  # the original body
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    sent = False
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}, after_first


def parse_object(body: bytes) -> dict[str, Any] | None:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) else None


def prompts_of(payload: Mapping[str, Any]) -> list[str]:
    """What the judge is told was asked: the last user turn, or each prompt of a completion. Never raises; vLLM validates."""
    prompt = payload.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        return [each if isinstance(each, str) else "" for each in prompt] if not prompt or not isinstance(prompt[0], int) else [""]
    messages = payload.get("messages", payload.get("input"))
    if isinstance(messages, str):
        return [messages]
    if isinstance(messages, list):
        users = [each for each in messages if isinstance(each, dict) and each.get("role") == "user"]
        return [text_of(users[-1].get("content"))] if users else [""]
    return [""]


def text_of(content: Any) -> str:
    """A message's text, whether given as a string or as parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


async def respond(send: Send, status: int, message: str) -> None:
    """An error in vLLM's (OpenAI's) shape."""
    kinds = {
        400: "BadRequestError",
        403: "PermissionDeniedError",
        404: "NotFoundError",
        409: "ConflictError",
        503: "ServiceUnavailableError",
    }
    body = json.dumps(
        {"error": {"message": message, "type": kinds.get(status, "InternalServerError"), "param": None, "code": status}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
