"""The HTTP control API under /v1/sku/. vLLM's --api-key protects it too, but for `ready` and `ui` (`open_routes.py`).

Every route but these two needs the header X-SKU-Token, and those that change something one that may. Changes are written to the audit
log. Open this file to add a route: a method of `Control`, and a line in `router`.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

from sku_vllm.errors import InputError, SkuError
from sku_vllm.serving.arm_changes import ArmChanges
from sku_vllm.serving.audit import in_force
from sku_vllm.serving.model_swap import ModelSwap
from sku_vllm.serving.open_routes import problem, ready, ui
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.state import Busy
from sku_vllm.serving.status import describe, listing, report
from sku_vllm.serving.tokens import Holder


class Weights(BaseModel):
    """Shares of the alias's traffic by arm; they sum to 1, arms left out get 0."""

    weights: dict[str, float]


class ArmSpec(BaseModel):
    """spec: base, lora:ADAPTER@SCALE or upstream:URL#MODEL, as after `--arm NAME=`.

    version: names what is behind the arm from now on; a change of several replicas gives all the same, so that their verdicts add up.
    """

    spec: str = Field(max_length=4096)
    version: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")


class NewArm(ArmSpec):
    """A new arm: its name, and its spec as in `ArmSpec`. place: its number among the arms, whose order says where each one's share of
    the keys lies; the last where it is not told."""

    name: str = Field(max_length=64)
    place: int | None = Field(None, ge=0)


class Judging(BaseModel):
    """Share of answers judged from now on."""

    sample: float = Field(ge=0, le=1)


class Swap(BaseModel):
    """Either an adapter to subtract at a scale, or a fused checkpoint of the same base."""

    adapter: str | None = Field(None, max_length=4096)
    scale: float = Field(1.0, ge=0, le=10)
    checkpoint: str | None = Field(None, max_length=4096)


class Refused(SkuError):
    """A request that this API refuses. status: the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ControlRoute(APIRoute):
    """A route that answers this package's exceptions with vLLM's JSON error object, and writes changes to the audit log."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, with our exceptions turned into responses."""
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            outcome = "failed"
            try:
                response = await handle(request)
                outcome = "ok"
                return response
            except SkuError as error:
                outcome = str(error)
                status = error.status if isinstance(error, Refused) else 409 if isinstance(error, Busy) else 500
                return problem(400 if isinstance(error, InputError) else status, str(error))
            finally:
                if hasattr(request.state, "note"):
                    request.state.note(outcome)

        return handle_errors


class Control:
    """The handlers of the control API of one server, one method per route."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.changes = ArmChanges(runtime)
        self.model = ModelSwap(runtime, self.changes)

    def holder(self, token: str | None) -> Holder:
        """Whose token this is. Raises Refused: 404 where the server was started without one, 401 for a missing or wrong one."""
        if not self.runtime.tokens.secrets:
            raise Refused(404, "the control API is off: start the server with --token or SKU_TOKEN")
        holder = self.runtime.tokens.holder(token)
        if holder is None:
            raise Refused(401, "X-SKU-Token is missing or wrong")
        return holder

    async def may_look(self, x_sku_token: str | None = Header(None)) -> None:
        """Check X-SKU-Token for a route that shows something. Raises Refused."""
        self.holder(x_sku_token)

    async def may_change(self, request: Request, x_sku_token: str | None = Header(None)) -> None:
        """Check X-SKU-Token for a route that changes something; what becomes of it goes to the audit log. Raises Refused."""
        holder = self.holder(x_sku_token)
        if not holder.changes:
            raise Refused(403, f"the token of {holder.name!r} may only look; use one that may change the server")
        what = f"{request.method} {request.url.path.partition('/v1/sku')[2]}{'?dry_run' if dry(request) else ''}"
        runtime, before = self.runtime, in_force(self.runtime.table, self.runtime.judge.sample)

        def note(outcome: str) -> None:
            runtime.audit.write(holder.name, what, before, in_force(runtime.table, runtime.judge.sample), outcome)

        request.state.note = note

    async def ready(self) -> Any:
        """See `ready`."""
        return ready(self.runtime)

    async def ui(self) -> Response:
        """See `ui`."""
        return ui(self.runtime)

    async def status(self) -> Any:
        """See `describe`."""
        return describe(self.runtime)

    async def arms(self) -> Any:
        """See `listing`."""
        return listing(self.runtime.table)

    async def weights(self, body: Weights, dry_run: bool = False) -> Any:
        """Change the arms' shares of traffic. dry_run, here and below: only check that it would work."""
        self._not_followed()
        return listing(await self.changes.set_weights(body.weights, dry_run))

    async def add(self, body: NewArm, dry_run: bool = False) -> Any:
        """Add an arm with weight 0."""
        self._not_followed()
        return listing(await self.changes.add(body.name, body.spec, body.version, dry_run, body.place))

    async def replace(self, name: str, body: ArmSpec, dry_run: bool = False) -> Any:
        """Replace an arm by another version."""
        self._not_followed()
        table, seconds = await self.changes.replace(name, body.spec, body.version, dry_run)
        return {**listing(table), "seconds": seconds}

    async def remove(self, name: str, dry_run: bool = False) -> Any:
        """Remove an arm whose weight is 0."""
        self._not_followed()
        return listing(await self.changes.remove(name, dry_run))

    def _not_followed(self) -> None:
        if self.runtime.config.follow:
            raise Refused(409, f"this server follows {self.runtime.config.follow}; change arms and weights there")

    async def swap(self, body: Swap, dry_run: bool = False) -> Any:
        """Replace the engine's own weights (a whole-model swap)."""
        if (body.adapter is None) == (body.checkpoint is None):
            raise InputError("swap: give either adapter (and scale) or checkpoint")
        source = {"adapter": body.adapter, "scale": round(body.scale, 2)} if body.adapter else {"checkpoint": body.checkpoint}
        return await (self.model.check(source) if dry_run else self.model.swap(source))

    async def restore(self) -> Any:
        """End a whole-model swap: load the base's weights again."""
        return await self.model.restore()

    async def judging(self, body: Judging) -> Any:
        """Change the share of answers that are judged."""
        if self.runtime.several:
            raise InputError("judging: several API servers each judge by themselves; restart with another --judge-sample")
        self.runtime.judge.sample = body.sample
        return {"judge": self.runtime.config.judge, "judge_sample": body.sample}

    async def experiment(self) -> Any:
        """See `report`."""
        return report(self.runtime)


def router(control: Control) -> APIRouter:
    """All routes of one server."""
    routes = APIRouter(prefix="/v1/sku", tags=["sku"], route_class=ControlRoute)
    routes.get("/ready", summary="200 once every arm is loaded and the engine can be trusted; no key or token needed")(control.ready)
    for method, path, action, summary in (
        ("GET", "/ui", control.ui, "A page for people, which asks for key and token; none needed for the page itself"),
        ("GET", "/status", control.status, "Arms, weights, swap, requests in flight"),
        ("GET", "/arms", control.arms, "Arms and their weights"),
        ("GET", "/experiment", control.experiment, "Per arm rates with intervals valid at any time, latencies, and a recommendation"),
        (
            "PUT",
            "/weights",
            control.weights,
            "Change the arms' shares of traffic; stored, and used by every process from its next request on",
        ),
        ("POST", "/arms", control.add, "Add an arm with weight 0"),
        ("PUT", "/arms/{name}", control.replace, "Replace an arm by another version; requests in flight finish on the old one"),
        ("DELETE", "/arms/{name}", control.remove, "Remove an arm of weight 0"),
        ("POST", "/swap", control.swap, "Replace the engine's own weights; verified by a probe, undone when anything fails"),
        ("POST", "/restore", control.restore, "Undo a swap: load the base's weights again, exactly"),
        ("PUT", "/judging", control.judging, "Change the share of answers that are judged, until a restart"),
    ):
        checked = control.may_look if method == "GET" else control.may_change
        depends = [] if path == "/ui" else [Depends(checked)]
        routes.add_api_route(path, action, methods=[method], summary=summary, dependencies=depends)
    return routes


def dry(request: Request) -> bool:
    """Whether a request only asks whether a change would work."""
    return request.query_params.get("dry_run", "").lower() in ("1", "true", "yes", "on")
