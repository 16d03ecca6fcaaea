"""What the middleware counts where vLLM never asked its engine, and what it takes for a route."""

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


@pytest.mark.parametrize("root", ["", "/x", "/x/"])
def test_a_root_path_hides_no_route_and_opens_none(tmp_path, monkeypatch, root):
    """Whatever its end, and whether the proxy in front removes it: as vLLM's routes and its --api-key see it."""
    import httpx
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from sku_vllm.serving.plugin import SkuEndpointPlugin

    config = ServeConfig("m", ["far=upstream:http://127.0.0.1:9/v1#m"], state=str(tmp_path / "state"))
    config.dump(tmp_path / "serve.yaml")
    monkeypatch.setenv("SKU_SERVE_CONFIG", str(tmp_path / "serve.yaml"))
    plugin, app = SkuEndpointPlugin(), FastAPI()
    app.root_path = root
    plugin.attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    prepare_state(config, plugin.runtime.state)

    async def status(path, **headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.post(path, json={"model": "sku", "messages": []}, headers=headers)).status_code

    async def all_of_them():
        for prefix in ("", root.rstrip("/")):
            path = f"{prefix}/v1/chat/completions"
            assert await status(path) == 401, path
            assert await status(path, Authorization="Bearer key") == 503, "the arm's server, which is not there, was asked"
        assert await status("/y/v1/chat/completions") == await status("/x//v1/chat/completions") == 404
        await plugin.runtime.session().close()

    asyncio.run(all_of_them())
