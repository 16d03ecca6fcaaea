"""The routing table and the file that stores it. Writers hold a lock, every API server reads the file, and so does a restarted server.

Open this file to change what `sku_state.json` holds, or how changes of it are locked and synced.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.output import json_text, stage_text, sync_path, sync_tree
from sku_vllm.serving.arms import Arm

FILE = "sku_state.json"
SCHEMA = "sku.serve-state/1"
# vLLM numbers its own adapters from 1; ids of arms start above that, and are stored so that every process uses the same ones.
FIRST_LORA_ID = 1_000_001


@dataclass(frozen=True, slots=True)
class Served:
    """An arm as the engine knows it. path: its negated adapter on disk; lora_id: its id in the engine (0 for base and upstream).

    version: names the weights behind it. It is new after every replacement, so that no verdict on the old ones counts for the new, and
    the same on every replica that was started and changed alike, so that their verdicts can be added up.
    """

    arm: Arm
    path: str = ""
    lora_id: int = 0
    version: str = ""

    @classmethod
    def numbered(cls, arm: Arm, path: str, number: int, plain: bool = False) -> "Served":
        """The arm under a number that no arm of this table has had (`Table.next_id`).

        plain: leave the number out of the version, where replicas follow a file and their histories may differ.
        """
        content = f"lora:{Path(path).name}" if path else arm.spec  # an adapter's directory is named by its digest and scale
        version = version_of(content, number)
        return cls(arm, path, number if arm.kind == "lora" else 0, version.partition("-")[0] if plain else version)

    @property
    def lora_name(self) -> str:
        """The adapter's name in vLLM, different for every version: the prefix cache is keyed by it, so old blocks are not reused."""
        return f"sku-{self.arm.name}-{self.lora_id}"


def version_of(content: str, number: int) -> str:
    """A version's name: 8 digits of the content's digest, and how many arms the table had had before."""
    return f"{hashlib.sha256(content.encode()).hexdigest()[:8]}-{number - FIRST_LORA_ID}"


@dataclass(frozen=True, slots=True)
class Table:
    """The routing table: all arms, their shares of traffic, and the current whole-model swap. Immutable; a change makes a new table.

    started_with: arms and split as given by the flags, to notice a later start with other flags.
    next_id: number of the next arm. generation: number of changes. notes: what --rollback-if and --drift did.
    swap: None, or what replaced the engine's own weights: {"adapter", "scale"} or {"checkpoint"}; swapped: that swap's version.
    """

    arms: dict[str, Served]
    split: dict[str, float]
    started_with: dict[str, Any] = field(default_factory=dict)
    next_id: int = FIRST_LORA_ID
    generation: int = 1
    swap: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    swapped: str = ""

    def changed(self, **changes: Any) -> "Table":
        """The next generation of this table, with these fields replaced."""
        return dataclasses.replace(self, generation=self.generation + 1, **changes)

    def with_arm(self, name: str, served: "Served", place: int | None) -> "Table":
        """This table and one more arm, of weight 0, as number `place` of its arms; None: the last."""
        order = list(self.arms)
        order.insert(len(order) if place is None else place, name)
        return dataclasses.replace(self, arms={**self.arms, name: served}, split={**self.split, name: 0.0}).in_order(order)

    def in_order(self, names: Sequence[str]) -> "Table":
        """This table with its arms in this order, which says whose interval of the split is where: all replicas need the same."""
        return dataclasses.replace(self, arms={name: self.arms[name] for name in names}, split={name: self.split[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """What the state file holds."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


class Busy(SkuError):
    """A change is refused because another change of the same server has not finished."""


class StateFile:
    """`DIR/sku_state.json`. A read costs one `stat` (about 2 µs) while the file is unchanged."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / FILE
        self._seen: tuple[int, int] | None = None
        self._table: Table | None = None

    def exists(self) -> bool:
        """Whether a state was ever written here."""
        return self.path.is_file()

    def read(self) -> Table:
        """The current table.

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
        """Replace the file in one rename. Its mode is 0600, since it contains the paths of harmful adapters."""
        self.put(self.stage(table))

    def stage(self, table: Table) -> Path:
        """Write the table to a temporary file next to the state file and sync it; `put` then renames it into place.

        New adapters are synced first, so that after a power cut no table on disk refers to an adapter that was lost.
        """
        known = set(self._table.arms.values()) if self._table else set()
        for path in {served.path for served in table.arms.values() if served.path and served not in known}:
            sync_tree(path)
            sync_path(Path(path).parent)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return stage_text(self.path, json_text(table.to_json()), mode=0o600)

    def put(self, staged: Path) -> None:
        """Rename a staged file to the state file, which makes its table current."""
        os.replace(staged, self.path)

    @contextmanager
    def locked(self) -> Iterator[Table]:
        """Hold the writers' lock and yield the current table, to be changed and written before the block ends.

        Raises:
            Busy: another task or process holds the lock.
        """
        with self.lock(wait=False):
            yield self.read()

    @contextmanager
    def lock(self, *, wait: bool) -> Iterator[None]:
        """Hold the writers' lock, which excludes tasks and processes alike. Raises Busy when it is taken and `wait` is False."""
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
        arms = {name: _served(each) for name, each in value.pop("arms").items()}
        return Table(arms=arms, **{**value, "notes": tuple(value.get("notes", ()))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a state file of this version ({error}); start with --reset-state to write it anew") from error


def _served(value: dict[str, Any]) -> Served:
    """One arm of a state file; a file of an earlier release names no versions."""
    known = "version" in value
    served = Served(Arm(**value.pop("arm")), **value)
    if known:
        return served
    return dataclasses.replace(Served.numbered(served.arm, served.path, served.lora_id or FIRST_LORA_ID), lora_id=served.lora_id)
