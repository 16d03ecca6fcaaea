"""The plugin's server side in a process of its own, without vLLM: real middleware, control API, judge and metrics.

In the engine's place stands a route that answers `fine`, or what follows in a prompt that begins with "say ". It listens on the port given
as its argument, with the configuration in SKU_SERVE_CONFIG.
"""

import contextlib
import sys
from argparse import Namespace

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import make_asgi_app

from sku_vllm.serving.control import Control, router
from sku_vllm.serving.follower import Follower
from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.middleware import SkuMiddleware
from sku_vllm.serving.observation import Observation
from sku_vllm.serving.open_routes import put_outermost
from sku_vllm.serving.route import ROUTE
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.serve_config import read_config


class Keyed:
    """As vLLM's --api-key: nothing below /v1 without it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith("/v1") and (b"authorization", b"Bearer key") not in scope["headers"]:
            return await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        await self.app(scope, receive, send)


def build(port, keyed=False):
    """The app, as the plugin puts it together in vLLM."""
    config = read_config()
    runtime = Runtime(config)
    runtime.args = Namespace(host="127.0.0.1", port=port, model=config.model, enable_lora=False)
    prepare_state(config, runtime.state)
    control = Control(runtime)

    @contextlib.asynccontextmanager
    async def following(app):
        if config.follow:
            Follower(runtime, control.changes).start()
        yield

    app = FastAPI(lifespan=following)
    app.add_middleware(SkuMiddleware, runtime=runtime)
    app.include_router(router(control))
    if keyed:
        app.add_middleware(Keyed)
    put_outermost(app, runtime)
    app.mount("/metrics", make_asgi_app())

    @app.post("/v1/completions")
    async def engine(request: Request):
        route, body = ROUTE.get(), await request.json()
        said = body["prompt"].removeprefix("say ") if body["prompt"].startswith("say ") else "fine"
        route.generations += 1
        seen = Observation(route, 0, None, "ok", texts={0: [said]}, finished={0})
        seen.finish(runtime)
        return {"model": body.get("model"), "choices": [{"text": said}]}

    runtime.table  # noqa: B018  # the first look exports the weights
    runtime.ready = True
    app.state.runtime = runtime
    return app


if __name__ == "__main__":
    uvicorn.run(build(int(sys.argv[1]), "keyed" in sys.argv), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
