"""Keeps a server's arms and weights as a file says, such as a ConfigMap that every replica mounts (`--follow FILE`).

The file (`followed_file.py`) is read again every few seconds. A content that cannot work is reported by `sku ctl status` and the log, and
changes nothing.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from sku_vllm.errors import SkuError
from sku_vllm.serving.arm_changes import ArmChanges
from sku_vllm.serving.audit import in_force
from sku_vllm.serving.followed_file import Wanted, read_wanted
from sku_vllm.serving.runtime import Runtime

EVERY = 2.0  # seconds between two looks at the file
AGAIN = 30.0  # seconds after which a content that could not be applied is tried again
logger = logging.getLogger("vllm.sku")


class Follower:
    """Follows one file. `runtime.following` says for `status` which file, and why its content is not in force where it is not."""

    def __init__(self, runtime: Runtime, changes: ArmChanges) -> None:
        self.runtime, self.changes = runtime, changes
        self.path = Path(str(runtime.config.follow))
        self.tried: tuple[str, float] | None = None  # the content that could not be applied, and when
        self.applied: str | None = None  # the content that is in force
        self.split: dict[str, float] = {}  # the weights as they then were

    def start(self) -> None:
        """Follow in the background, as long as the server runs."""
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # the next look tries again
                await self.look()
            await asyncio.sleep(EVERY)

    async def look(self) -> None:
        """Read the file once, and make what it says true, where it is not what was made true before.

        So what --rollback-if or --drift did stays until the file changes.
        """
        now = asyncio.get_running_loop().time()
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        if self.tried and self.tried[0] == text and now - self.tried[1] < AGAIN:
            return
        runtime = self.runtime
        if text == self.applied:
            table = runtime.table
            lowered = table.notes[-1] if table.notes and table.split != self.split else None
            runtime.following = {"file": str(self.path), "problem": lowered, "generation": table.generation}
            return
        generation, before = runtime.table.generation, in_force(runtime.table, runtime.judge.sample)
        try:
            wanted = read_wanted(self.path)
            await self._apply(wanted)
            self.tried, problem = None, None
            self.applied, self.split = text, wanted.split
        except SkuError as error:
            self.tried, problem = (text, now), str(error)
            logger.error("sku: %s is not in force: %s", self.path, problem)
        after = runtime.table
        if after.generation != generation:
            runtime.audit.write("file", str(self.path), before, in_force(after, runtime.judge.sample), problem or "ok")
        runtime.following = {"file": str(self.path), "problem": problem, "generation": after.generation}

    async def _apply(self, wanted: Wanted) -> None:
        """First check every change, then make them. Raises SkuError."""
        table = self.runtime.table
        new = {name: spec for name, spec in wanted.arms.items() if name not in table.arms}
        changed = {name: spec for name, spec in wanted.arms.items() if name in table.arms and table.arms[name].arm.spec != spec}
        gone = [name for name in table.arms if name not in wanted.arms]
        for dry_run in (True, False):
            for name, spec in new.items():
                await self.changes.add(name, spec, None, dry_run)
            for name, spec in changed.items():
                await self.changes.replace(name, spec, None, dry_run)
        if self.runtime.table.split != {**wanted.split, **dict.fromkeys(gone, 0.0)}:
            await self.changes.set_weights(wanted.split)
        for name in gone:
            await self.changes.remove(name)
        if list(self.runtime.table.arms) != list(wanted.arms):
            with self.runtime.state.locked() as table:
                self.runtime.change(table.in_order(list(wanted.arms)).changed())
