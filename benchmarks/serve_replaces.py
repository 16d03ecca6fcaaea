"""Whether a server stays the size it is over many replaces of an arm: memory, open files, bytes on disk and metrics."""

import contextlib
import time
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.serve_load import completion
from sku_vllm.benchmarks.serve_swaps import PROMPTS
from sku_vllm.cli.options import log

LOOKS = (0.1, 0.5, 1.0)  # shares of the replaces after which it is measured; before the first, caches fill
FLAT = 0.02
WRITTEN = ("server.log", "audit.jsonl")  # what is only appended to


def replaces(server: Any, scratch: Path, adapter: Path, wanted: int) -> dict[str, Any]:
    """Replace the arm `negated` that many times, each time by another scale, with a judged answer of every version.

    Args:
        scratch: the server's temporary directory.
    Returns:
        The sizes at `LOOKS`, and by how much memory, files, disk and series have grown between the first look and the last, as shares.
    """
    import httpx

    server.control("PUT", "judging", {"sample": 1.0})
    looks, seconds, errors = [], time.perf_counter(), 0
    at = {max(1, round(share * wanted)) for share in LOOKS}
    with httpx.Client(timeout=120) as client:
        for number in range(1, wanted + 1):
            server.control("PUT", "arms/negated", {"spec": f"lora:{adapter}@{0.01 * (1 + number % 100):.2f}"})
            status, _ = completion(client, server.url, PROMPTS[number % len(PROMPTS)])
            errors += status != 200
            if number in at:
                looks.append({"replaces": number, **settled(server, scratch)})
                log(f"after {number} replaces: {looks[-1]}")
    first, last = looks[0], looks[-1]
    grown = {name: last[name] / first[name] - 1 for name in ("memory_bytes", "files", "disk_bytes", "series")}
    return {
        "replaces": wanted,
        "errors": errors,
        "looks": looks,
        "grown": grown,
        "flat": all(abs(each) <= FLAT for each in grown.values()),
        "goal": FLAT,
        "seconds": time.perf_counter() - seconds,
    }


def settled(server: Any, scratch: Path, deadline: float = 30.0) -> dict[str, int]:
    """The server's size once replaced adapters have left the disk, which they do when the engine has dropped them."""
    end = time.monotonic() + deadline
    while len(list(server.run.glob("adapters/*"))) > 1 and time.monotonic() < end:
        time.sleep(0.1)
    return size(server, scratch)


def size(server: Any, scratch: Path) -> dict[str, int]:
    """Resident memory and open files of all its processes, series on /metrics, and the files in its directories, logs apart."""
    import psutil

    memory = files = 0
    for process in [root := psutil.Process(server.process.pid), *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += process.memory_info().rss
            files += process.num_fds()
    found = [path for place in (server.run, scratch) for path in place.rglob("*") if path.is_file()]
    kept = [path for path in found if path.name not in WRITTEN]
    return {
        "memory_bytes": memory,
        "files": files,
        "series": sum(map(len, server.metrics().values())),
        "disk_bytes": sum(path.stat().st_size for path in kept),
        "disk_files": len(kept),
        "log_bytes": sum(path.stat().st_size for path in found if path not in kept),
    }
