"""The two routes that answer without vLLM's --api-key: `ready` for probes, which have no key, and the static page, which asks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sku_vllm.serving.request_body import route_path
from sku_vllm.serving.runtime import Runtime

PAGE = Path(__file__).with_name("ui.html")
# The page loads nothing from elsewhere and is shown in no other page.
LOCKED = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
}


def ready(runtime: Runtime) -> Response:
    """200 once every arm is loaded; 503 while they load, after SIGTERM, and after a swap that failed and could not be undone."""
    if runtime.closing:
        return problem(503, "shutting down")
    if not runtime.ready or runtime.broken:
        return problem(503, runtime.broken or "arms are still loading")
    return JSONResponse({"ready": True})


def ui(runtime: Runtime) -> Response:
    """The page for people; it holds nothing of this server."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=LOCKED)


def problem(status: int, message: str) -> JSONResponse:
    """An error response with vLLM's JSON error object."""
    return JSONResponse({"error": {"message": message, "type": "SkuError", "param": None, "code": status}}, status_code=status)


OPEN: dict[str, Callable[[Runtime], Response]] = {"/v1/sku/ready": ready, "/v1/sku/ui": ui}


def put_outermost(app: Any, runtime: Runtime) -> None:
    """Add `OpenRoutes` outside everything that the app has by now. vLLM has built the chain of middleware already; it is built again."""
    app.user_middleware.insert(0, Middleware(OpenRoutes, runtime=runtime))
    app.middleware_stack = app.build_middleware_stack()


class OpenRoutes:
    """Outermost middleware: answers reading requests for `OPEN` before anything between can refuse them."""

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app, self.runtime = app, runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = OPEN.get(route_path(scope)) if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") else None
        if route:
            return await route(self.runtime)(scope, receive, send)
        await self.app(scope, receive, send)
