"""Questions for a running OpenAI-compatible server, and the counters it exports. Standard library only; no prompt is ever logged."""

import json
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sku_vllm.arm_metrics import parse
from sku_vllm.errors import RunError

# What a traffic series is made of: judged answers and the harmful ones among them.
COUNTERS = {"n": "sku_judged_total", "hits": "sku_harmful_total"}


def http_url(text: str) -> bool:
    """Whether a text is an http or https URL with a host, and a port that exists if it names one."""
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def ask(
    server: str,
    model: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    arm: str | None = None,
    temperature: float = 1.0,
    max_tokens: int = 128,
    seed: int = 0,
    concurrency: int = 8,
    timeout: float = 120,
) -> list[str]:
    """The answer to every conversation from `SERVER/v1/chat/completions`, in order; request i is sampled with seed + i.

    A token in SKU_TOKEN lets `arm` be chosen on a server that hides its arms; OPENAI_API_KEY is sent as bearer token.

    Raises:
        RunError: the server did not answer one of them.
    """
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    if os.environ.get("SKU_TOKEN"):
        headers["X-SKU-Token"] = os.environ["SKU_TOKEN"]
    if arm:
        headers["X-SKU-Arm"] = arm

    def one(indexed: tuple[int, Sequence[Mapping[str, str]]]) -> str:
        number, messages = indexed
        body = {"model": model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens, "seed": seed + number}
        reply = fetch(f"{server}/v1/chat/completions", json.dumps(body).encode(), headers, timeout)
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RunError(f"{server}: the reply is not a chat completion; is this an OpenAI-compatible server?") from error

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, enumerate(conversations)))


def arm_counters(*, metrics: str | None = None, prometheus: str | None = None, timeout: float = 30) -> dict[str, dict[str, int]]:
    """{arm: {"hits", "n"}} as counted since the server started, from its `/metrics` or from a Prometheus that scrapes it.

    Raises:
        RunError: the address does not answer, or answers something else.
    """
    found: dict[str, dict[str, int]] = {}
    samples = _scraped(metrics, timeout) if metrics else _queried(str(prometheus), timeout)
    for field, arm, value in samples:
        counts = found.setdefault(arm, {"hits": 0, "n": 0})
        counts[field] += int(value) if math.isfinite(value) else 0
    return found


def fetch(url: str, data: bytes | None = None, headers: Mapping[str, str] | None = None, timeout: float = 30) -> str:
    """The body of a GET (or POST, with data); every failure becomes a RunError that names the address, never the request."""
    # No proxy from the environment: the server is named explicitly and usually local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data=data, headers=dict(headers or {})), timeout=timeout) as reply:
            return reply.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise RunError(f"{url}: answered {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{url}: no answer ({getattr(error, 'reason', error)}); is the server running?") from error


def _scraped(url: str, timeout: float) -> list[tuple[str, str, float]]:
    try:
        found = parse(fetch(url, timeout=timeout))
    except ValueError as error:
        raise RunError(f"{url}: not Prometheus text; give the address of the server's /metrics") from error
    samples = [(field, labels, value) for field, name in COUNTERS.items() for labels, value in found.get(name, {}).items()]
    return [(field, dict(labels).get("arm", ""), value) for field, labels, value in samples]


def _queried(url: str, timeout: float) -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = []
    for field, name in COUNTERS.items():
        query = urllib.parse.urlencode({"query": f"sum by (arm) ({name})"})
        address = f"{url.rstrip('/')}/api/v1/query?{query}"
        try:
            reply: dict[str, Any] = json.loads(fetch(address, timeout=timeout))
            found += [(field, row["metric"].get("arm", ""), float(row["value"][1])) for row in reply["data"]["result"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(
                f"{address}: not a Prometheus query API; give the address of Prometheus itself, such as http://host:9090"
            ) from error
    return found
