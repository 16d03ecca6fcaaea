"""How much memory this process has had at most."""

import resource
from pathlib import Path


def peak_resident() -> int:
    """Bytes resident at the peak. `ru_maxrss` outlives exec, so what a large parent held before it started us would count."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
