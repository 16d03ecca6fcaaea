"""Changes of a running server: each under the writers' lock, each either whole or undone."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from sku_vllm.errors import ConfigError, InputError, RunError
from sku_vllm.serving.arms import MAX_ARMS, check_split, parse_arm
from sku_vllm.serving.materialise import materialise, served_rank
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.state import Busy, Served, Table

RETIRE = 3600.0
WAIT_FOR_SLOT = 60.0


class Changes:
    """Weights and arms of one server."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.retiring: set[asyncio.Task[None]] = set()

    # ---- weights ------------------------------------------------------------------------------------------------

    async def set_weights(self, weights: Mapping[str, float]) -> Table:
        """Replace the split; in force for the next request of every process, and after a restart."""
        with self.runtime.state.locked() as table:
            async with Staged(self.runtime, table.changed(split=check_split(weights, list(table.arms), "weights"))) as staged:
                return await staged.commit()

    # ---- arms ---------------------------------------------------------------------------------------------------

    async def add(self, name: str, spec: str) -> Table:
        """A new arm, with weight 0 until the weights say otherwise."""
        with self.runtime.state.locked() as table:
            if name in table.arms:
                raise ConfigError(f"arm {name!r} exists; replace it instead, or choose another name")
            if len(table.arms) >= MAX_ARMS:
                raise ConfigError(f"there are {MAX_ARMS} arms already; remove one first")
            served, next_id = await self.prepare(table, name, spec)
            changed = table.changed(arms={**table.arms, name: served}, split={**table.split, name: 0.0}, next_id=next_id)
            return await self._take_in(served, changed)

    async def replace(self, name: str, spec: str) -> tuple[Table, float]:
        """New version under a new name and path, flip, retire: requests in flight finish on the old one. Also the seconds from the version
        on disk to answers from it.
        """
        with self.runtime.state.locked() as table, Counted(self.runtime):
            old = _arm(table, name)
            served, next_id = await self.prepare(table, name, spec)
            start = time.perf_counter()
            changed = await self._take_in(served, table.changed(arms={**table.arms, name: served}, next_id=next_id))
            seconds = time.perf_counter() - start
            self.runtime.metrics.swap_seconds.observe(seconds)
            self.runtime.experiment.forget(name)
            self._retire(old)
            return changed, seconds

    async def remove(self, name: str) -> Table:
        """Take an arm away; its weight must be 0 first, so that nobody is moved without being asked."""
        with self.runtime.state.locked() as table:
            old = _arm(table, name)
            if table.split.get(name):
                raise ConfigError(f"arm {name!r} has weight {table.split[name]:g}; set its weight to 0 first")
            if len(table.arms) == 1:
                raise ConfigError(f"{name!r} is the only arm; add another one first")
            keep = {each: served for each, served in table.arms.items() if each != name}
            async with Staged(self.runtime, table.changed(arms=keep, split={each: table.split[each] for each in keep})) as staged:
                changed = await staged.commit()
            self.runtime.experiment.forget(name)
            self._retire(old)
            return changed

    async def prepare(self, table: Table, name: str, spec: str) -> tuple[Served, int]:
        """An arm whose adapter lies on disk, and the next free adapter id. Nothing that serves has changed."""
        config = self.runtime.config
        arm = parse_arm(name, spec)
        if arm.kind != "lora":
            return Served(arm), table.next_id
        await self._adapters_allowed(table)
        directory = self.runtime.directory / "adapters"
        negation = await asyncio.to_thread(
            materialise, arm, config.model, directory, revision=config.revision, any_base=config.any_base
        )
        limit = self.runtime.args.max_lora_rank
        if negation.rank > int(limit):
            raise ConfigError(
                f"arm {name}: rank {negation.rank} is above this server's {limit}; "
                f"restart it with --max-lora-rank {served_rank([negation.rank])}"
            )
        return Served(arm, str(negation.path), table.next_id), table.next_id + 1

    async def _take_in(self, served: Served, changed: Table) -> Table:
        """Load a prepared arm and put the table that names it in force: both, or neither."""
        async with Staged(self.runtime, changed) as staged:
            await self.load(served)
            try:
                return await staged.commit()
            except RunError:
                if served.lora_id:
                    await self.runtime.engine.remove_lora(served.lora_id)
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
        """Refuse what has no slot; versions about to be retired are waited for, since swaps may follow each other closely."""
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
            task = asyncio.create_task(self._unload(old))
            self.retiring.add(task)
            task.add_done_callback(self.retiring.discard)

    async def _unload(self, old: Served) -> None:
        """Free the slot once nobody uses it."""
        deadline = time.monotonic() + RETIRE
        while self.runtime.in_flight[old.lora_id] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.runtime.engine.remove_lora(old.lora_id)
        del self.runtime.in_flight[old.lora_id]


class Staged:
    """A table that is written and synced off the event loop, while the block does what it stands for; `commit` renames it into force.
    Left without, nothing has changed.
    """

    def __init__(self, runtime: Runtime, table: Table) -> None:
        self.runtime, self.table = runtime, table

    async def __aenter__(self) -> "Staged":
        self.written: asyncio.Future[Path] = asyncio.ensure_future(asyncio.to_thread(self.runtime.state.stage, self.table))
        return self

    async def commit(self) -> Table:
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
    """Counts a change of what is served by its outcome."""

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
