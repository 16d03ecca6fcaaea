"""What the middleware counts where vLLM never asked its engine."""

import asyncio
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.middleware import SkuMiddleware
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.serve_config import ServeConfig

SCOPE = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "query_string": b""}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_left_before_the_engine_was_asked_is_cancelled(tmp_path, streaming):
    """vLLM ends such a request with status 200 and no content: it must not count as an answer."""
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    (tmp_path / "words.json").write_text(json.dumps({"harmful": ["badword"]}))
    config = ServeConfig("m", ["original=base"], judge=f"lexicon:{tmp_path}/words.json", state=str(tmp_path / "state"))
    runtime = Runtime(config)
    prepare_state(config, runtime.state)
    app, left = FastAPI(), asyncio.Event()

    async def tokens():
        await asyncio.Event().wait()
        yield "data: never"

    @app.post("/v1/completions")
    @with_cancellation
    async def engine(body: dict, raw_request: Request):
        left.set()
        return StreamingResponse(tokens()) if streaming else await asyncio.Event().wait()

    async def ask():
        body = json.dumps({"model": runtime.aliases[0], "prompt": "x"}).encode()
        asked, sent = iter([{"type": "http.request", "body": body}]), []

        async def receive():
            if request := next(asked, None):
                return request
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await SkuMiddleware(app, runtime)({**SCOPE, "path": "/v1/completions", "headers": headers}, receive, send)
        return sent

    def counted():
        return {outcome: runtime.metrics.requests.labels("original", outcome, "no")._value.get() for outcome in ("ok", "cancelled")}

    before = counted()
    sent = asyncio.run(asyncio.wait_for(ask(), 60))
    assert sent[0]["status"] == 200  # what makes it look like an answer
    assert {name: value - before[name] for name, value in counted().items()} == {"ok": 0, "cancelled": 1}
    assert runtime.requests == 0
