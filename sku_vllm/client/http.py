"""The HTTP client of this package, and the errors for a request that fails.

Open this file to change proxies, certificates or redirects. (Only `upstream:` arms use another one: aiohttp, in vLLM's event loop.)
"""

import functools
import json
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from sku_vllm.client.socket_path import reachable
from sku_vllm.errors import ConfigError, RunError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class ServerRefused(RunError):
    """A server answered with an HTTP error. status: its code. body: its text, kept out of the message as it may quote the request."""

    def __init__(self, url: str, status: int, reason: str, body: str) -> None:
        super().__init__(f"{url}: answered {status} {reason}")
        self.status, self.body = status, body


def http_client(
    *,
    proxy: bool = False,
    timeout: float = 30,
    uds: str | None = None,
    trust: ssl.SSLContext | None = None,
    base: str = "",
    connections: int = 100,
) -> httpx.Client:
    """A client for several requests, from any number of threads.

    Args:
        proxy: use the proxies named in the environment (HTTP_PROXY, NO_PROXY, …). Loopback addresses never use a proxy.
        timeout: seconds for connecting and for every read, not for the whole answer.
        uds: path of the Unix socket that every request goes to.
        trust: which certificates to accept; None: those this machine trusts.
        base: put in front of a request's URL that begins with "/"; the server that X-SKU-Token is for.
        connections: most at a time; they stay open for the next request.

    Raises:
        ConfigError: `proxy`, and the environment names one that cannot be used.
    """
    hooks: dict[str, list[Callable[..., Any]]] | None = {"request": [_stays_home(httpx.URL(base).host)]} if base else None
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    verify = trust or _trusted()
    if uds:
        transport = httpx.HTTPTransport(uds=reachable(uds), verify=verify, limits=limits)
        return httpx.Client(transport=transport, trust_env=False, timeout=timeout, follow_redirects=True, base_url=base, event_hooks=hooks)
    direct = {f"all://{host}": None for host in LOOPBACK}
    settings: dict[str, Any] = {"verify": verify, "timeout": timeout, "base_url": base, "limits": limits, "event_hooks": hooks}
    try:
        return httpx.Client(trust_env=proxy, mounts=direct, follow_redirects=True, **settings)
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its package, or no proxy's address at all
        raise ConfigError(f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a proxy that cannot be used: {error}") from error


def _stays_home(host: str) -> Callable[[httpx.Request], None]:
    """A redirect to another host does not take the control token there. httpx sees to the key (Authorization)."""

    def checked(request: httpx.Request) -> None:
        if request.url.host != host:
            request.headers.pop("x-sku-token", None)

    return checked


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The certificates this machine trusts (httpx by default uses its own list); cached, since reading them takes about 20 ms."""
    return ssl.create_default_context()


@functools.cache
def unverified() -> ssl.SSLContext:
    """Accepts any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@functools.cache
def trusting_nobody() -> ssl.SSLContext:
    """Accepts no certificate: for a server that is asked without TLS, where reading the machine's certificates would be for nothing."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def fetch(
    url: str,
    *,
    method: str = "GET",
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30,
    proxy: bool = False,
    client: httpx.Client | None = None,
) -> str:
    """The text of an answer.

    Args:
        body: sent as JSON, unless it is None.
        timeout, proxy: see `http_client`; not used with `client`, which serves several requests.

    Raises:
        ServerRefused: the server answered with an error.
        RunError: there was no answer. Both messages contain the URL but not the request's body or headers.
    """
    if client is None:
        with http_client(proxy=proxy, timeout=timeout) as one:
            return fetch(url, method=method, body=body, headers=headers, client=one)
    name = url if "://" in url else f"{str(client.base_url).rstrip('/')}{url}"
    try:
        # Latin-1, as header values are sent: httpx alone would refuse a token with an umlaut.
        sent = httpx.Headers({"Content-Type": "application/json", **(headers or {})}, encoding="latin-1")
        reply = client.request(method, url, content=None if body is None else json.dumps(body).encode(), headers=sent)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise RunError(f"{name}: no answer ({str(error) or type(error).__name__}); is the server up, and is this its address?") from error
    text = reply.content.decode("utf-8", "replace")
    if not reply.is_success:
        raise ServerRefused(name, reply.status_code, reply.reason_phrase, text)
    return text


def fetch_json(url: str, **request: Any) -> Any:
    """The parsed JSON of an answer; arguments and errors as in `fetch`.

    Raises:
        ValueError: the answer is not JSON.
    """
    return json.loads(fetch(url, **request))
