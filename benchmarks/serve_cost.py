"""What the middleware alone adds to a request, in process; and a judge that never answers."""

import asyncio
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def middleware_cost(base: Path, work: Path) -> dict[str, float]:
    """Milliseconds the middleware adds to a 2 KB chat request, in process: with and without it, request by request."""
    from sku_vllm.serving.initial_state import prepare_state
    from sku_vllm.serving.middleware import SkuMiddleware
    from sku_vllm.serving.runtime import Runtime
    from sku_vllm.serving.serve_config import ServeConfig

    config = ServeConfig(str(base), ["original=base", "other=base"], run=str(work / "run"), expose_arms=True)
    runtime = Runtime(config)
    prepare_state(config, runtime.state)
    body = json.dumps({"model": "sku", "messages": [{"role": "user", "content": "word " * 380}], "max_tokens": 32}).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    routed = SkuMiddleware(app, runtime)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"x-sku-key", b"user-1")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "root_path": ""}

    async def once(target: Any) -> float:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            return None

        start = time.perf_counter()
        await target(dict(scope), receive, send)
        return (time.perf_counter() - start) * 1000

    async def run() -> tuple[list[float], list[float]]:
        without, with_it = [], []
        for _ in range(3000):
            without.append(await once(app))
            with_it.append(await once(routed))
        return without[500:], with_it[500:]

    without, with_it = asyncio.run(run())
    added = {q: quantile(with_it, q) - quantile(without, q) for q in (0.5, 0.99)}
    return {"bytes": len(body), "p50_ms": added[0.5], "p99_ms": added[0.99], "goal_p50_ms": 0.3, "goal_p99_ms": 1.0}


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` (0 to 1, not 1) of them lies."""
    return sorted(values)[int(q * len(values))]


@contextlib.contextmanager
def stalled_judge() -> Iterator[str]:
    """An endpoint that accepts every request and never answers."""
    release = threading.Event()

    class Never(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            release.wait()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Never)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        release.set()
        server.shutdown()
        server.server_close()
