"""What answers a request under a routing table: the arms, or during a whole-model swap the engine's own weights in their place."""

from typing import Any

from sku_vllm.serving.arms import SWAPPED, Arm
from sku_vllm.serving.state import Served, Table

CLOSED = "this server is shutting down, and its --shutdown-timeout is over; ask another one"  # what a request is told that waited till then


class Unavailable(Exception):
    """The request cannot be answered. status: the HTTP status, such as 409 during a whole-model swap, 503 for a failed arm.

    arm: the arm whose `sku_requests` counts it; None counts nothing.
    """

    def __init__(self, status: int, message: str, arm: str | None = None) -> None:
        super().__init__(message)
        self.status, self.arm = status, arm


def effective_split(table: Table) -> dict[str, float]:
    """The shares that requests are routed by: during a whole-model swap `swapped` gets the share of every arm on this engine."""
    if not table.swap:
        return table.split
    upstream = {name: weight for name, weight in table.split.items() if not table.arms[name].arm.on_engine}
    return {SWAPPED: 1 - sum(upstream.values()), **upstream}


def answering(table: Table, name: str) -> Served | None:
    """The arm of this name; `swapped` are the engine's own weights, for as long as a whole-model swap is in force."""
    if name == SWAPPED and table.swap:
        return Served(Arm(SWAPPED, "base"), version=table.swapped)
    return table.arms.get(name)


def versions(table: Table) -> dict[str, str]:
    """{arm: version} of everything that can answer."""
    found = {name: served.version for name, served in table.arms.items()}
    return found | ({SWAPPED: table.swapped} if table.swap else {})


def lora_request(served: Served) -> Any:
    """vLLM's `LoRARequest` for an arm's adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=served.lora_name, lora_int_id=served.lora_id, lora_path=served.path)
