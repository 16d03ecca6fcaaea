"""Sends chat requests to a running OpenAI-compatible server, several at a time. Prompts are never logged."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx

from sku_vllm.client.http import fetch_json, http_client
from sku_vllm.errors import RunError

Conversation = Sequence[Mapping[str, str]]
AT_A_TIME = 8  # requests under way
TIMEOUT = 120.0  # seconds for connecting and for every read of an answer


class Journal(Protocol):
    """Answers that outlive a run."""

    @property
    def known(self) -> Mapping[int, str]:
        """Those of an earlier run, by number."""
        ...

    def keep(self, number: int, response: str) -> None:
        """Store an answer as it comes, from any thread."""
        ...


def ask(
    server: str,
    model: str | None,
    conversations: Sequence[Conversation],
    *,
    arm: str | None = None,
    seed: int = 0,
    journal: Journal | None = None,
    **sampling: Any,
) -> list[str]:
    """The answer to every conversation from `SERVER/v1/chat/completions`, in order; request i is sampled with seed + i.

    `arm` needs the server's token in SKU_TOKEN, unless the server runs with --expose-arms. OPENAI_API_KEY is sent as bearer token.

    Args:
        model: None is the name that the server's clients use (`served_name`).
        journal: gets each answer as it comes; those that it knows are not asked for.
        sampling: `temperature` (1), `max_tokens` (128) and whatever else the API takes.

    Raises:
        RunError: the server did not answer a request, or its answer is not a chat completion.
    """
    headers = _headers(arm)
    options = {"temperature": 1.0, "max_tokens": 128, **sampling}

    def one(number: int, messages: Conversation) -> str:
        if journal and number in journal.known:
            return journal.known[number]
        body = {"model": name, "messages": list(messages), **options, "seed": seed + number}
        try:
            reply = fetch_json(f"{server}/v1/chat/completions", method="POST", body=body, headers=headers, client=client)
            answer = str(reply["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RunError(f"{server}: the reply is not a chat completion; is this an OpenAI-compatible server?") from error
        if journal:
            journal.keep(number, answer)
        return answer

    with http_client(timeout=TIMEOUT, base=server) as client, ThreadPoolExecutor(AT_A_TIME) as pool:
        name = model or served_name(client, headers)
        return list(pool.map(one, range(len(conversations)), conversations))


def served_name(client: httpx.Client, headers: Mapping[str, str]) -> str:
    """The model name that clients of the server of `client` use: the first that it lists, an alias where it has arms.

    Raises:
        RunError: it does not answer, or lists no model.
    """
    try:
        return str(fetch_json("/v1/models", headers=headers, client=client)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(f"{client.base_url}: lists no model; is this an OpenAI-compatible server?") from error


def _headers(arm: str | None) -> dict[str, str]:
    headers = {}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    if os.environ.get("SKU_TOKEN"):
        headers["X-SKU-Token"] = os.environ["SKU_TOKEN"]
    if arm:
        headers["X-SKU-Arm"] = arm
    return headers
