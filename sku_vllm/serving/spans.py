"""Arm and version as attributes of vLLM's OpenTelemetry spans, which it writes with --otlp-traces-endpoint.

vLLM makes the span of a request outside that request's context, from its id alone, so ids are kept here while they run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sku_vllm.serving.route import Route

ID = "gen_ai.request.id"
_running: dict[str, Route] = {}


@contextmanager
def describing(request_id: str, route: Route) -> Iterator[None]:
    """Inside this block the span of the engine request gets the attributes `sku.arm`, `sku.version` and `sku.shadow`."""
    _running[request_id] = route
    try:
        yield
    finally:
        _running.pop(request_id, None)


def attributes_of(request_id: Any) -> dict[str, Any]:
    """The attributes of a running engine request; none for one that no arm was chosen for, such as a probe."""
    route = _running.get(str(request_id))
    return {} if route is None else {"sku.arm": route.arm, "sku.version": route.version, "sku.shadow": route.shadow}


def describe_spans() -> None:
    """Let vLLM's spans carry the attributes. Does nothing where this vLLM makes its spans otherwise."""
    from vllm.v1.engine import output_processor

    inner: Callable[..., Any] | None = getattr(output_processor, "instrument_manual", None)
    if inner is None or hasattr(inner, "sku"):
        return

    def instrument(*arguments: Any, attributes: dict[str, Any] | None = None, **options: Any) -> Any:
        known = attributes or {}
        return inner(*arguments, attributes={**known, **attributes_of(known.get(ID))}, **options)

    instrument.sku = True  # type: ignore[attr-defined]
    output_processor.instrument_manual = instrument  # type: ignore[attr-defined, assignment]
