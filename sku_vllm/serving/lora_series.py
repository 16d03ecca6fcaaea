"""vLLM's gauge `vllm:lora_requests_info` gets a series for every set of adapter names that ran or waited together, and keeps it."""

import os

from prometheus_client import REGISTRY

GAUGE = "vllm:lora_requests_info"


def forget_lora_series(name: str) -> None:
    """Export the series no more that name this adapter, which is unloaded: every replaced version would leave some behind.

    They stay where vLLM has no such gauge, and in prometheus_client's multiprocess mode, which removes nothing.
    """
    gauge = getattr(REGISTRY, "_names_to_collectors", {}).get(GAUGE)
    if gauge is None or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return
    for sample in [sample for metric in gauge.collect() for sample in metric.samples]:
        if any(name in value.split(",") for value in sample.labels.values()):
            gauge.remove(*sample.labels.values())
