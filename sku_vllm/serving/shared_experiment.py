"""The experiment of several API-server processes: each writes its counts to a file next to the state file and reads the others'."""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from sku_vllm.output import write_json
from sku_vllm.serving.experiment import Experiment

EVERY = 0.5  # seconds between two snapshots
logger = logging.getLogger("vllm.sku")


class SharedExperiment:
    """Writes one process's experiment to a file twice a second and reads those of its siblings (processes with the same parent).

    The files of an earlier server, which a kill leaves behind, are removed, also where its processes had the same ids: a container that
    starts again often gives them anew.
    """

    def __init__(self, directory: Path, experiment: Experiment) -> None:
        self.directory, self.experiment = directory, experiment
        self.family = f"sku_experiment.{os.getppid()}-{born(os.getppid())}."
        self.path = directory / f"{self.family}{os.getpid()}.json"
        self.siblings: dict[str, tuple[int, dict[str, Any]]] = {}
        for old in directory.glob("sku_experiment.*.json"):
            if not old.name.startswith(self.family):  # an earlier server's
                old.unlink(missing_ok=True)
        experiment.others = self.others
        threading.Thread(target=self._publish, name="sku-sharing", daemon=True).start()

    def others(self) -> list[dict[str, Any]]:
        """What the siblings last published; a file is parsed again only when it has changed."""
        found = []
        for path in self.directory.glob(self.family + "*.json"):
            if path == self.path:
                continue
            try:
                stamp = path.stat().st_mtime_ns
                if self.siblings.get(path.name, (0,))[0] != stamp:
                    self.siblings[path.name] = stamp, json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logger.warning("sku: %s cannot be read: %s", path.name, type(error).__name__)
            if path.name in self.siblings:
                found.append(self.siblings[path.name][1])
        return found

    def _publish(self) -> None:
        last = None
        while True:
            now = self.experiment.snapshot()
            if now != last:
                try:
                    write_json(self.path, now, mode=0o600)
                    last = now
                except OSError as error:
                    logger.warning("sku: the experiment's counts cannot be shared: %s", error.strerror)
            time.sleep(EVERY)


def born(process: int) -> str:
    """When a process started, as its children all see it: the boot and the clock's ticks since then; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot[:8]}-{Path(f'/proc/{process}/stat').read_text(encoding='utf-8', errors='replace').rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
