"""Changes of a running server's arms and traffic shares. Each holds the writers' lock and takes effect completely or not at all.

Open this file to see how an arm is replaced while requests run. Swaps of the whole model are in `model_swap.py`.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from sku_vllm.errors import ConfigError, InputError, RunError, SkuError
from sku_vllm.serving.address import check_not_itself
from sku_vllm.serving.arms import MAX_ARMS, check_split, parse_arm, scale_looked_up
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.state import Busy, Served, Table
from sku_vllm.serving.vllm_flags import too_high

RETIRE = 3600.0  # seconds after which a replaced adapter is unloaded even if a request still uses it
WAIT_FOR_SLOT = 60.0  # seconds a change waits for replaced adapters to free their slots


class ArmChanges:
    """Changes the arms of one server and their shares of traffic (`weights`)."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.retiring: set[asyncio.Task[None]] = set()  # each frees an adapter slot
        self.discarding: set[asyncio.Task[None]] = set()
        self.leaving: dict[int, Served] = {}  # replaced versions that are not unloaded yet, by adapter id

    # ---- weights ------------------------------------------------------------------------------------------------

    async def set_weights(self, weights: Mapping[str, float], dry_run: bool = False) -> Table:
        """Replace the shares of traffic by arm. Every process uses them from its next request on, and so does a restarted server.

        dry_run, here and below: only check that the change would work, and return the table as it is.
        """
        with self.runtime.state.locked() as table:
            if dry_run:
                check_split(weights, list(table.arms), "weights")
                return table
            async with Staged(self.runtime, table.changed(split=check_split(weights, list(table.arms), "weights"))) as staged:
                return await staged.commit()

    # ---- arms ---------------------------------------------------------------------------------------------------

    async def add(self, name: str, spec: str, version: str | None = None, dry_run: bool = False, place: int | None = None) -> Table:
        """Add an arm with weight 0, as number `place` of them. Raises ConfigError for a name in use or a spec that cannot work."""
        with self.runtime.state.locked() as table:
            if name in table.arms or name in self.runtime.aliases:
                taken = "exists; replace it instead" if name in table.arms else "is a model name of this server's clients"
                raise ConfigError(f"arm {name!r} {taken}, or choose another name")
            if len(table.arms) >= MAX_ARMS:
                raise ConfigError(f"there are {MAX_ARMS} arms already; remove one first")
            served, next_id = await self.prepare(table, name, spec)
            if dry_run:
                self.discard(served)
                return table
            served = named(served, version)
            changed = table.with_arm(name, served, place).changed(next_id=next_id)
            return await self._take_in(served, changed)

    async def replace(self, name: str, spec: str, version: str | None = None, dry_run: bool = False) -> tuple[Table, float]:
        """Replace an arm by another version; requests in flight finish on the old one, which is unloaded afterwards.

        Returns the new table, and the seconds from the adapter being on disk to the new version answering.
        """
        with self.runtime.state.locked() as table, contextlib.nullcontext() if dry_run else Counted(self.runtime):
            old = _arm(table, name)
            served, next_id = await self.prepare(table, name, spec)
            if dry_run:
                self.discard(served)
                return table, 0.0
            served = named(served, version)
            start = time.perf_counter()
            changed = await self._take_in(served, table.changed(arms={**table.arms, name: served}, next_id=next_id))
            seconds = time.perf_counter() - start
            self.runtime.metrics.swap_seconds.observe(seconds)
            self._retire(old)
            return changed, seconds

    async def remove(self, name: str, dry_run: bool = False) -> Table:
        """Remove an arm. Its weight must be 0 first, so that a removal by itself never sends clients to another arm."""
        with self.runtime.state.locked() as table:
            old = _arm(table, name)
            if table.split.get(name):
                raise ConfigError(f"arm {name!r} has weight {table.split[name]:g}; set its weight to 0 first")
            if len(table.arms) == 1:
                raise ConfigError(f"{name!r} is the only arm; add another one first")
            if dry_run:
                return table
            keep = {each: served for each, served in table.arms.items() if each != name}
            async with Staged(self.runtime, table.changed(arms=keep, split={each: table.split[each] for each in keep})) as staged:
                changed = await staged.commit()
            self._retire(old)
            return changed

    async def prepare(self, table: Table, name: str, spec: str) -> tuple[Served, int]:
        """Parse the arm and write its adapter to disk. Returns it with the next free adapter id; what is being served does not change."""
        arm = parse_arm(name, scale_looked_up(spec, f"arm {name}"))
        check_not_itself(arm, self.runtime.args)
        if arm.kind != "lora":
            return Served.numbered(arm, "", table.next_id, plain=bool(self.runtime.config.follow)), table.next_id + 1
        await self._adapters_allowed(table)
        adapter = await self.runtime.write_adapter(arm, "adapters")
        limit = self.runtime.args.max_lora_rank
        served = Served.numbered(arm, str(adapter.path), table.next_id, plain=bool(self.runtime.config.follow))
        if adapter.rank > int(limit):
            self.discard(served)
            raise ConfigError(too_high(arm, adapter.rank, limit))
        return served, table.next_id + 1

    async def _take_in(self, served: Served, changed: Table) -> Table:
        """Load a prepared arm into the engine and make the table that contains it current: both, or neither."""
        async with Staged(self.runtime, changed) as staged:
            try:
                await self.load(served)
                return await staged.commit()
            except SkuError as error:
                if served.lora_id and isinstance(error, RunError):
                    await self.runtime.engine.remove_lora(served.lora_id)
                self.discard(served)
                raise

    async def load(self, served: Served) -> None:
        """Put a prepared arm's adapter into the engine. Raises ConfigError with vLLM's reason when it cannot."""
        try:
            if served.lora_id:
                await self.runtime.load(served)
        except Exception as error:
            raise ConfigError(f"arm {served.arm.name}: vLLM cannot load {served.arm.source}: {error}") from error
        self.runtime.failures.pop(served.arm.name, None)

    async def _adapters_allowed(self, table: Table) -> None:
        """Raise ConfigError where no adapter can be loaded now: another mode is on, or no slot is free.

        Waits up to `WAIT_FOR_SLOT` for replaced versions that are about to be unloaded.
        """
        args = self.runtime.args
        if self.runtime.several:
            raise ConfigError(
                "adapters cannot change at run time with several API servers, which do not know each other's requests in flight; "
                "restart with other arms"
            )
        if table.swap:
            raise ConfigError("adapters cannot change while a whole-model swap is in force; restore first")
        if not getattr(args, "enable_lora", False):
            raise ConfigError("this server was started without adapters; restart it with --enable-lora --max-loras 4 --max-lora-rank 64")
        arms = sum(served.lora_id > 0 for served in table.arms.values()) + len(self.runtime.resolved())
        deadline = time.monotonic() + WAIT_FOR_SLOT
        while arms + 2 <= args.max_loras < arms + 2 + len(self.retiring) and time.monotonic() < deadline:
            await asyncio.wait(self.retiring, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        loaded = arms + len(self.retiring)
        if loaded + 2 > args.max_loras:
            raise ConfigError(
                f"all but one of the {args.max_loras} adapter slots are taken, and one stays free; "
                f"remove an arm, or restart with --max-loras {loaded + 2}"
            )

    def _retire(self, old: Served) -> None:
        if old.lora_id:
            self.leaving[old.lora_id] = old
            self.retiring.add(task := asyncio.create_task(self._unload(old)))
            task.add_done_callback(self.retiring.discard)

    async def _unload(self, old: Served) -> None:
        """Unload a replaced adapter once no request uses it, or after `RETIRE` seconds, and remove its copy from the disk.

        The copy stays where a request still uses it: vLLM exits when it is missing.
        """
        deadline = time.monotonic() + RETIRE
        while self.runtime.in_flight[old.lora_id] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.runtime.unload(old)
        if self.runtime.in_flight[old.lora_id]:
            return
        del self.runtime.in_flight[old.lora_id]
        # A change that waits for a slot holds the state, which the removal of the copy needs: a task of its own.
        self.discarding.add(task := asyncio.create_task(self._discard_left(old)))
        task.add_done_callback(self.discarding.discard)

    async def _discard_left(self, old: Served) -> None:
        """Remove the copy of an unloaded adapter from the disk, as soon as nothing else changes the state."""
        while True:
            with contextlib.suppress(Busy), self.runtime.state.locked():
                del self.leaving[old.lora_id]
                return self.discard(old)
            await asyncio.sleep(0.05)

    def discard(self, served: Served) -> None:
        """Remove an adapter's copy that no arm uses. The writers' lock is held, so no arm is being given the same one."""
        if served.path and all(each.path != served.path for each in (*self.runtime.table.arms.values(), *self.leaving.values())):
            shutil.rmtree(served.path, ignore_errors=True)


def named(served: Served, version: str | None) -> Served:
    """The arm under the version that was asked for, if any."""
    return dataclasses.replace(served, version=version) if version else served


class Staged:
    """A new routing table, written to a temporary file and synced in a thread while the block changes the engine.

    `commit` renames the file into place, which makes the table current. Without `commit` the file is deleted and nothing changes.
    """

    def __init__(self, runtime: Runtime, table: Table) -> None:
        self.runtime, self.table = runtime, table

    async def __aenter__(self) -> "Staged":
        self.written: asyncio.Future[Path] = asyncio.ensure_future(asyncio.to_thread(self.runtime.state.stage, self.table))
        return self

    async def commit(self) -> Table:
        """Make the table current. Raises RunError when it cannot be written; the old table then stays current."""
        try:
            self.runtime.state.put(await self.written)
        except OSError as error:
            file = self.runtime.state.path
            raise RunError(f"{file}: {error.strerror}, so the change is not in force; make room there and try again") from error
        return self.runtime.table

    async def __aexit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            (await self.written).unlink(missing_ok=True)


class Counted:
    """Counts the block in `sku_swaps` by outcome: ok, refused (bad input, or another change is under way) or failed."""

    def __init__(self, runtime: Runtime) -> None:
        self.swaps = runtime.metrics.swaps

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.swaps.labels("ok" if kind is None else "refused" if issubclass(kind, InputError | Busy) else "failed").inc()


def _arm(table: Table, name: str) -> Served:
    if name not in table.arms:
        raise ConfigError(f"unknown arm {name!r}; the arms are {', '.join(table.arms)}")
    return table.arms[name]
