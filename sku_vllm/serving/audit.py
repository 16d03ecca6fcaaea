"""Who changed what: one JSON line per control action, in a file that is only appended to.

Open this file to change what a line holds. With --state the file is DIR/audit.jsonl, else what --audit names; without either the lines
go to the server's log.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.state import Table

logger = logging.getLogger("vllm.sku")


def in_force(table: Table, judge_sample: float) -> dict[str, Any]:
    """What a line says of a server before and after an action."""
    arms = {name: {"spec": served.arm.spec, "version": served.version} for name, served in table.arms.items()}
    return {"arms": arms, "weights": table.split, "swap": table.swap, "judge_sample": judge_sample}


class AuditLog:
    """Appends lines of JSON. Each is written by one system call, so that processes may share the file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def check(self) -> None:
        """Create the file where it is missing. Raises ConfigError where it cannot be written: actions would happen without a line."""
        try:
            if self.path:
                os.close(self._open(self.path))
        except OSError as error:
            raise ConfigError(f"--audit {self.path}: {error.strerror}; name a file that can be written") from error

    @staticmethod
    def _open(path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, who: str, what: str, before: Any, after: Any, outcome: str = "ok") -> None:
        """One action, as `{"time", "who", "what", "before", "after", "outcome"}`.

        who: the token's name. what: the route or rule. before, after: see `in_force`. outcome: ok, or why not.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": stamp, "who": who, "what": what, "before": before, "after": after, "outcome": outcome})
        if self.path is None:
            logger.info("sku: audit %s", line)
            return
        try:
            descriptor = self._open(self.path)
            try:
                os.write(descriptor, line.encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:  # the action has happened; that it could not be written down must be seen
            logger.error("sku: %s cannot be written (%s): audit %s", self.path, error.strerror, line)


def audit_path(config: ServeConfig) -> Path | None:
    """The file that a server's configuration names; None without one."""
    if config.audit:
        return Path(config.audit)
    return Path(config.state) / "audit.jsonl" if config.state else None
