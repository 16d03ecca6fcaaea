"""The control API under /v1/sku/, where vLLM's --api-key reaches too; every route but `ready` wants X-SKU-Token as well."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sku_vllm import __version__
from sku_vllm.errors import InputError, SkuError
from sku_vllm.serving.change import Changes
from sku_vllm.serving.model_swap import ModelSwap
from sku_vllm.serving.runtime import Runtime, effective_split
from sku_vllm.serving.state import Busy, Table


class Weights(BaseModel):
    """Shares of the alias's traffic by arm; they sum to 1, arms left out get 0."""

    weights: dict[str, float]


class ArmSpec(BaseModel):
    """spec: base, lora:ADAPTER@SCALE or upstream:URL#MODEL, as after `--arm NAME=`."""

    spec: str = Field(max_length=4096)


class NewArm(ArmSpec):
    name: str = Field(max_length=64)


class Judging(BaseModel):
    """Share of answers judged from now on."""

    sample: float = Field(ge=0, le=1)


class Swap(BaseModel):
    """Either an adapter to subtract at a scale, or a fused checkpoint of the same base."""

    adapter: str | None = Field(None, max_length=4096)
    scale: float = Field(1.0, ge=0, le=10)
    checkpoint: str | None = Field(None, max_length=4096)


def router(runtime: Runtime) -> APIRouter:
    """All routes of one server."""
    routes = APIRouter(prefix="/v1/sku", tags=["sku"])
    changes = Changes(runtime)
    model = ModelSwap(runtime, changes)

    async def answer(token: str | None, action: Callable[[], Any]) -> Any:
        if not runtime.config.token:
            return problem(404, "the control API is off: start the server with --token or SKU_TOKEN")
        if not runtime.token_valid(token):
            return problem(401, "X-SKU-Token is missing or wrong")
        try:
            result = action()
            return await result if hasattr(result, "__await__") else result
        except Busy as error:
            return problem(409, str(error))
        except InputError as error:
            return problem(400, str(error))
        except SkuError as error:
            return problem(500, str(error))

    @routes.get("/ready", summary="200 once every arm is loaded and the engine can be trusted; no token needed")
    async def ready() -> Any:
        if runtime.ready and not runtime.broken:
            return {"ready": True}
        return problem(503, runtime.broken or "arms are still loading")

    @routes.get("/status", summary="Arms, weights, swap, requests in flight")
    async def status(x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: describe(runtime))

    @routes.get("/arms", summary="Arms and their weights")
    async def arms(x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: listing(runtime.table))

    @routes.put("/weights", summary="Change the split; atomic, persisted, in force for the next request of every process")
    async def weights(body: Weights, x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: then_list(changes.set_weights(body.weights)))

    @routes.post("/arms", summary="Add an arm with weight 0")
    async def add(body: NewArm, x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: then_list(changes.add(body.name, body.spec)))

    @routes.put("/arms/{name}", summary="Replace an arm: new version, flip, retire; nothing fails and nothing mixes")
    async def replace(name: str, body: ArmSpec, x_sku_token: str | None = Header(None)) -> Any:
        async def act() -> Any:
            table, seconds = await changes.replace(name, body.spec)
            return {**listing(table), "seconds": seconds}

        return await answer(x_sku_token, act)

    @routes.delete("/arms/{name}", summary="Remove an arm of weight 0")
    async def remove(name: str, x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: then_list(changes.remove(name)))

    @routes.post("/swap", summary="Replace the engine's own weights; verified by a probe, undone when anything fails")
    async def swap(body: Swap, x_sku_token: str | None = Header(None)) -> Any:
        def act() -> Any:
            if (body.adapter is None) == (body.checkpoint is None):
                raise InputError("swap: give either adapter (and scale) or checkpoint")
            source = {"adapter": body.adapter, "scale": round(body.scale, 2)} if body.adapter else {"checkpoint": body.checkpoint}
            return model.swap(source)

        return await answer(x_sku_token, act)

    @routes.post("/restore", summary="Load the base's own weights again, exactly")
    async def restore(x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, model.restore)

    @routes.put("/judging", summary="Judge another share of answers, until a restart")
    async def judging(body: Judging, x_sku_token: str | None = Header(None)) -> Any:
        def act() -> Any:
            if runtime.several:
                raise InputError("judging: several API servers each judge by themselves; restart with another --judge-sample")
            runtime.judge.sample = body.sample
            return {"judge": runtime.config.judge, "judge_sample": body.sample}

        return await answer(x_sku_token, act)

    @routes.get("/experiment", summary="Per arm rates with intervals valid at any time, latencies, and a recommendation")
    async def experiment(x_sku_token: str | None = Header(None)) -> Any:
        return await answer(x_sku_token, lambda: report(runtime))

    return routes


async def then_list(change: Awaitable[Table]) -> dict[str, Any]:
    return listing(await change)


def listing(table: Table) -> dict[str, Any]:
    """Arms as an operator wrote them, with weights."""
    felt = effective_split(table)
    return {
        "arms": {name: {"spec": served.arm.spec, "kind": served.arm.kind, "weight": table.split[name], "version": served.lora_id or None}
                 for name, served in table.arms.items()},
        "traffic": felt, "swap": table.swap, "generation": table.generation, "notes": list(table.notes),
    }


def describe(runtime: Runtime) -> dict[str, Any]:
    config = runtime.config
    return {
        "version": __version__, "ready": runtime.ready and not runtime.broken, "broken": runtime.broken, "failures": runtime.failures,
        "in_flight": sum(runtime.in_flight.values()), "judge": config.judge, "judge_sample": runtime.judge.sample,
        "judge_waiting": runtime.judge.pending.qsize(), "expose_arms": config.expose_arms, "blind": config.blind,
        "state": config.state, **listing(runtime.table),
    }


def report(runtime: Runtime) -> dict[str, Any]:
    table = runtime.table
    reference = next((name for name, served in table.arms.items() if served.arm.kind == "base"), None)
    shared = any(served.lora_id for served in table.arms.values()) and reference is not None
    names = [*table.arms, *(name for name in effective_split(table) if name not in table.arms)]
    page = runtime.experiment.report(names, reference, shared)
    if runtime.several:
        page["caveats"].append("several API servers: the others' counts are up to a second old")
    return {**page, "split": table.split, "swap": table.swap, "notes": list(table.notes)}


def problem(status: int, message: str) -> JSONResponse:
    """An error in vLLM's shape."""
    return JSONResponse({"error": {"message": message, "type": "SkuError", "param": None, "code": status}}, status_code=status)
