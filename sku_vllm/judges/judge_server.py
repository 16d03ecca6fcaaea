"""The server behind an `openai:` judge: its address, connections that stay open, retries, and the words in which it takes a request.

Open this file when an API refuses a parameter that others need.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from sku_vllm.client.http import http_client
from sku_vllm.errors import JudgeError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
logger = logging.getLogger("sku_vllm.judges")
MORE_TOKENS = 16  # times as many for a reply that was cut before its verdict, as a reasoning model's is


class JudgeServer:
    """Sends requests of a judge, from any number of threads. OPENAI_API_KEY is sent as bearer token.

    name: of the judge, for errors. url: with or without `/v1`, or the whole address of chat completions or moderations. options: fields of
    every request that a server may refuse; what it wants instead is remembered. timeout: seconds for connecting and for each read.
    retries: further attempts after a time-out, a lost connection or a status in `RETRIED`. They wait `pause` seconds, doubled each time,
    or what Retry-After says, up to a minute.
    """

    def __init__(
        self, name: str, url: str, options: dict[str, Any], *, timeout: float, retries: int, connections: int, pause: float
    ) -> None:
        self.name, self.urls, self.options = name, addresses(url), options
        self.timeout, self.retries, self.connections, self.pause = timeout, retries, connections, pause
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """The path of the address."""
        return urlsplit(self.urls[0]).path

    def connect(self) -> None:
        """Open the client, once; called before threads ask."""
        self._client = self._client or http_client(proxy=True, timeout=self.timeout, connections=self.connections)

    def allow_more(self, than: dict[str, Any]) -> None:
        """Let replies be longer from now on, unless that was done since a request with the options `than`."""
        with self._lock:
            if self.options == than:
                key = "max_tokens" if "max_tokens" in than else "max_completion_tokens"
                self.options = than | {key: MORE_TOKENS * than[key]}

    def post(self, body: dict[str, Any]) -> Any:
        """The reply to a request, which is sent again after trouble that may pass, and in other words where the server asks for them.

        Raises:
            JudgeError: the server does not answer, or refuses.
        """
        assert self._client is not None
        attempt, problem = 0, ""
        while attempt <= self.retries:
            wait = self.pause * 2**attempt * random.uniform(0.8, 1.2)
            url = self.urls[0]
            try:
                with self._client.stream("POST", url, content=json.dumps(body).encode(), headers=_headers(url)) as response:
                    if response.is_success:
                        return json.loads(response.read())
                    told = _begin_of_body(response)
                    problem = f"HTTP {response.status_code} {told[:200]}"
                    if response.status_code == 404 and "model" not in told.casefold() and self._next_address(url):
                        continue
                    if response.status_code in (400, 422) and (other := self._adapted(body, told)):
                        body = other
                        continue
                    if response.status_code not in RETRIED:
                        raise JudgeError(f"judge {self.name}: {problem}; check the URL, the model's name and OPENAI_API_KEY")
                    wait = _retry_after(response) or wait
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RecursionError) as error:
                problem = str(error) or type(error).__name__
            attempt += 1
            if attempt <= self.retries:
                time.sleep(wait)
        raise JudgeError(f"judge {self.name}: no answer after {self.retries + 1} attempts ({problem}); is the server at {self.urls[0]} up?")

    def _next_address(self, tried: str) -> bool:
        """Whether there is another address to try; once one answers, it stays."""
        with self._lock:
            if self.urls[0] == tried and len(self.urls) > 1:
                self.urls = self.urls[1:]
            return self.urls[0] != tried

    def _adapted(self, body: dict[str, Any], complaint: str) -> dict[str, Any] | None:
        """The request in the words that a server's complaint asks for, None where it names none that can be changed."""
        changes: tuple[tuple[str, Callable[[dict[str, Any]], None]], ...] = (
            ("max_completion_tokens", _completion_tokens),
            ("temperature", lambda options: options.pop("temperature")),
            ("response_format", lambda options: options.pop("response_format")),
            ("chat_template_kwargs", lambda options: options.pop("chat_template_kwargs")),
        )
        for word, change in changes:
            key = "max_tokens" if word == "max_completion_tokens" else word
            if word in complaint and key in body:
                if word == "chat_template_kwargs":
                    logger.warning(
                        "judge %s: the server refuses chat_template_kwargs, so the guard is asked without the policy in them (%s)",
                        self.name,
                        complaint[:80],
                    )
                other = dict(body)
                change(other)
                with self._lock:
                    self.options = {name: value for name, value in other.items() if name not in ("model", "messages", "input")}
                return other
        return None


def _completion_tokens(options: dict[str, Any]) -> None:
    # Models that take only this one reason first, and these tokens count too.
    options["max_completion_tokens"] = MORE_TOKENS * options.pop("max_tokens")


def addresses(url: str) -> list[str]:
    """The addresses that a URL may mean, likeliest first: a whole one as it is; `http://host:8000` and `…/v1` with the rest added."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if path.endswith(("/chat/completions", "/moderations")):
        paths = [path]
    elif path.rpartition("/")[2][:1] == "v" and path.rpartition("/")[2][1:2].isdigit():
        paths = [f"{path}/chat/completions"]
    else:
        paths = [f"{path}/v1/chat/completions", f"{path}/chat/completions"]
    return [urlunsplit((parts.scheme, parts.netloc, one, parts.query, "")) for one in paths]


def _headers(url: str) -> httpx.Headers:
    headers = httpx.Headers({"Content-Type": "application/json"}, encoding="latin-1")
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
        if "/openai/deployments/" in url:
            headers["api-key"] = key  # Azure's name for it
    return headers


def _begin_of_body(response: httpx.Response) -> str:
    try:
        return next(response.iter_bytes(2000), b"").decode(errors="replace")
    except httpx.HTTPError:  # the connection ended before the body
        return ""


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(60.0, max(0.0, float(response.headers.get("Retry-After", ""))))
    except ValueError:
        return None
