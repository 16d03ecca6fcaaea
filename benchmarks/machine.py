"""The machine a benchmark ran on."""

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """{"cpu", "cores" this process may use, "load" of the last minute, "system", "date", "versions"}."""
    from sku_vllm.output import versions

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
