"""One prompt to several arms of a running server at the same time, each answer streamed as it comes."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from sku_vllm.client.control import hint, said, tls_hint
from sku_vllm.client.server_address import ServerAddress
from sku_vllm.errors import RunError


def ask_arms(
    address: ServerAddress,
    arms: Sequence[str],
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    timeout: float,
    heard: Callable[[str, str], None],
) -> dict[str, str]:
    """{arm: its answer}; `heard(arm, text)` is called for each piece as it comes, from the arm's own thread.

    Raises:
        RunError: an arm cannot be asked, refuses or breaks off.
    """

    def one(arm: str) -> str:
        pieces = []
        try:
            with address.client(timeout) as client:
                request = client.stream("POST", "/v1/chat/completions", json=dict(body), headers={**headers, "X-SKU-Arm": arm})
                with request as reply:
                    if not reply.is_success:
                        message = said(reply.read().decode("utf-8", "replace"))
                        raise RunError(f"{address.text}: arm {arm}: {reply.status_code}: {message}{hint(reply.status_code, message)}")
                    for line in reply.iter_lines():
                        piece = text_in(line)
                        if piece:
                            pieces.append(piece)
                            heard(arm, piece)
        except (httpx.HTTPError, OSError) as error:
            why = str(error) or type(error).__name__
            raise RunError(f"{address.text}: arm {arm}: no answer ({why}); is the server up?{tls_hint(why, address)}") from error
        return "".join(pieces)

    with ThreadPoolExecutor(max(1, len(arms))) as pool:
        return dict(zip(arms, pool.map(one, arms), strict=True))


def text_in(line: str) -> str:
    """The text in one line of a streamed chat; "" where there is none."""
    data = line.removeprefix("data:").strip()
    if data == line or not data.startswith("{"):
        return ""
    try:
        choice = json.loads(data)["choices"][0]["delta"]
        return str(choice.get("reasoning") or "") + str(choice.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ""
