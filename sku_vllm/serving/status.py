"""The JSON answers of the control API: arms, status and experiment."""

from typing import Any

from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.state import Table
from sku_vllm.serving.traffic import effective_split, versions
from sku_vllm.version import __version__


def listing(table: Table) -> dict[str, Any]:
    """The arms with specs and weights, and the shares that requests are really routed by (`traffic`)."""
    return {
        "arms": {
            name: {"spec": served.arm.spec, "kind": served.arm.kind, "weight": table.split[name], "version": served.version}
            for name, served in table.arms.items()
        },
        "traffic": effective_split(table),
        "swap": table.swap,
        "generation": table.generation,
        "notes": list(table.notes),
    }


def describe(runtime: Runtime) -> dict[str, Any]:
    """The answer to `GET /v1/sku/status`."""
    config = runtime.config
    return {
        "version": __version__,
        "ready": runtime.ready and not runtime.broken and not runtime.closing,
        "broken": runtime.broken,
        "closing": runtime.closing,
        "failures": runtime.failures,
        "in_flight": runtime.requests,
        "judge": config.judge,
        "judge_sample": runtime.judge.sample,
        "judge_waiting": runtime.judge.waiting,
        "judge_health": runtime.judge.health.describe(),
        "aliases": list(runtime.aliases),
        "follow": runtime.following,
        "expose_arms": config.expose_arms,
        "blind": config.blind,
        "state": config.state,
        **listing(runtime.table),
    }


def report(runtime: Runtime) -> dict[str, Any]:
    """The answer to `GET /v1/sku/experiment`; the reference is the first arm of kind base."""
    table = runtime.table
    reference = next((name for name, served in table.arms.items() if served.arm.kind == "base"), None)
    shared = any(served.lora_id for served in table.arms.values()) and reference is not None
    current = versions(table)
    page = runtime.experiment.report(list(current), reference, shared, current, runtime.judge.health.blind())
    page["caveats"] += judge_caveats(runtime)
    if runtime.several:
        page["caveats"].append("several API servers: the others' counts are up to a second old")
    return {**page, "split": table.split, "swap": table.swap, "notes": list(table.notes)}


def judge_caveats(runtime: Runtime) -> list[str]:
    """What a reader of the rates must know of the judge: that it sees nothing, or less than it seems."""
    health = runtime.judge.health.describe()
    if health["blind"]:
        return [str(health["blind"])]
    share = health["unread_share"]
    return [f"the judge gave no verdict on {share:.0%} of its last answers: {health['last_error']['reason']}"] if share > 0.05 else []
