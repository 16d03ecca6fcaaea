"""Where one HTTP request goes: the arm that answers it, and what is needed to measure and judge the answer."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sku_vllm.judges.exchange import Turns


@dataclass(slots=True)
class Route:
    """Where one HTTP request goes.

    version: names the weights behind the arm, see `Served`. lora: the arm's adapter in the engine (a `LoRARequest`), None for the
    engine's own weights. conversations: what the judge gets, one for each prompt. arrived: `time.perf_counter` of the request.
    bucket: the sticky key's bucket, the unit of the experiment's tests. shadow: a replay for judging only.
    resolved: the client named an adapter below --adapter-root, so vLLM's request already carries the adapter.
    beam: beam search, in which vLLM makes one engine request per step, so the middleware measures the whole answer instead.
    generations: engine requests started for this HTTP request. users: how many of HTTP request and engine requests still run.
    """

    arm: str
    version: str
    lora: Any
    conversations: list[Turns]
    arrived: float
    bucket: int = 0
    shadow: bool = False
    resolved: bool = False
    beam: bool = False
    generations: int = 0
    users: int = 0


ROUTE: ContextVar[Route | None] = ContextVar("sku_route", default=None)
