"""The routing table, in one small file: every API-server process reads it, one writes it, a restart finds it."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.output import json_text, stage_text, sync_path, sync_tree
from sku_vllm.serving.arms import Arm

FILE = "sku_state.json"
SCHEMA = "sku.serve-state/1"
# Above anything vLLM's own counter reaches; the same in every process, since it is stored here.
FIRST_LORA_ID = 1_000_001


@dataclass(frozen=True, slots=True)
class Served:
    """An arm as the engine knows it. path: materialised adapter; lora_id: its id in the engine (0 for base and upstream)."""

    arm: Arm
    path: str = ""
    lora_id: int = 0

    @property
    def lora_name(self) -> str:
        """A name of its own for every version: prefix-cache blocks are keyed by it, so an old version's are never reused."""
        return f"sku-{self.arm.name}-{self.lora_id}"


@dataclass(frozen=True, slots=True)
class Table:
    """All arms, their weights, and what whole-model swap is in force. Immutable: a change makes a new one.

    started_with: arms and split as the flags gave them, to notice a later start with other flags.
    swap: None, or what the engine's own weights were replaced by.
    """

    arms: dict[str, Served]
    split: dict[str, float]
    started_with: dict[str, Any] = field(default_factory=dict)
    next_id: int = FIRST_LORA_ID
    generation: int = 1
    swap: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def changed(self, **changes: Any) -> "Table":
        return dataclasses.replace(self, generation=self.generation + 1, **changes)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


class Busy(SkuError):
    """A change was refused because another one is under way."""


class StateFile:
    """`DIR/sku_state.json`. Reads cost one `stat` (about 2 µs) unless another process has written."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / FILE
        self._seen: tuple[int, int] | None = None
        self._table: Table | None = None

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self) -> Table:
        """The table as it stands now.

        Raises:
            ConfigError: the file is missing or not one of ours.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            if self._table is not None:
                return self._table
            raise ConfigError(f"{self.path}: {error.strerror}; start with --reset-state to write it anew") from error
        mark = (status.st_mtime_ns, status.st_ino)
        if mark != self._seen or self._table is None:
            self._table = _parse(self.path)
            self._seen = mark
        return self._table

    def write(self, table: Table) -> None:
        """Replace the file in one rename; 0600, since arms name where harmful adapters lie."""
        self.put(self.stage(table))

    def stage(self, table: Table) -> Path:
        """The file to be, complete and synced beside the one in force, which `put` replaces by it; every adapter it newly names is synced
        before, so that no table on disk names one that a power cut could lose.
        """
        known = set(self._table.arms.values()) if self._table else set()
        for path in {served.path for served in table.arms.values() if served.path and served not in known}:
            sync_tree(path)
            sync_path(Path(path).parent)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return stage_text(self.path, json_text(table.to_json()), mode=0o600)

    def put(self, staged: Path) -> None:
        os.replace(staged, self.path)

    @contextmanager
    def locked(self) -> Iterator[Table]:
        """Hold the writers' lock over read-change-write, across tasks and processes.

        Raises:
            Busy: somebody else is changing things; of two concurrent changes one wins and the other is told so.
        """
        with self.lock(wait=False):
            yield self.read()

    @contextmanager
    def lock(self, *, wait: bool) -> Iterator[None]:
        """The writers' lock itself. Raises Busy when it is taken and `wait` is off."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy("another change of this server is under way; try again when it is done") from None
            yield


def _parse(path: Path) -> Table:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        arms = {name: Served(Arm(**each.pop("arm")), **each) for name, each in value.pop("arms").items()}
        return Table(arms=arms, **{**value, "notes": tuple(value.get("notes", ()))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a state file of this version ({error}); start with --reset-state to write it anew") from error
