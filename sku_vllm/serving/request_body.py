"""Request bodies in ASGI: read a body, replay or replace it, parse it, and respond with an error."""

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The request's path as vLLM's routes see it: without the --root-path that a proxy in front may or may not have removed.

    What they do not see must not be routed here either: vLLM asks for --api-key by the path that follows the root as it is written.
    """
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    rest = path.removeprefix(root)
    return rest if rest.startswith("/") else path


async def read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it once more and then passes on later messages (disconnects)."""
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
    """A `receive` that gives this body, or the disconnect message `ended` instead, and then the messages of `receive`."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    if ended is not None:
        pending = [ended]

    async def again() -> Message:
        return pending.pop(0) if pending else await receive()

    return again


async def never() -> Message:
    """A `receive` for a request without a client: no message ever comes."""
    await asyncio.Event().wait()
    raise AssertionError


def replaced_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The same request with another body and a content-length that fits it."""
    sent = False

    async def after_first() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            await receive()  # the original body
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}, after_first


def parse_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None for anything else."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) else None


async def respond(send: Send, status: int, message: str) -> None:
    """Send an error response with vLLM's (OpenAI's) JSON error object."""
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
