"""Changes of a running server: each under the writers' lock, each either whole or undone."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from sku_vllm.errors import ConfigError, InputError, RunError
from sku_vllm.serving.arms import MAX_ARMS, check_split, parse_arm
from sku_vllm.serving.materialise import materialise
from sku_vllm.serving.probe import Probe, distance
from sku_vllm.serving.runtime import Runtime, lora_request
from sku_vllm.serving.state import Busy, Served, Table

DRAIN = 120.0
RETIRE = 3600.0
WAIT_FOR_SLOT = 60.0


class Changes:
    """Weights, arms and whole-model swaps of one server."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.retiring: set[asyncio.Task[None]] = set()
        self.base_probe: Probe | None = None

    # ---- weights ------------------------------------------------------------------------------------------------

    def set_weights(self, weights: Mapping[str, float]) -> Table:
        """Replace the split; in force for the next request of every process, and after a restart."""
        with self.runtime.state.locked() as table:
            return self.runtime.change(table.changed(split=check_split(weights, list(table.arms), "weights")))

    # ---- arms ---------------------------------------------------------------------------------------------------

    async def add(self, name: str, spec: str) -> Table:
        """A new arm, with weight 0 until the weights say otherwise."""
        with self.runtime.state.locked() as table:
            if name in table.arms:
                raise ConfigError(f"arm {name!r} exists; replace it instead, or choose another name")
            if len(table.arms) >= MAX_ARMS:
                raise ConfigError(f"there are {MAX_ARMS} arms already; remove one first")
            served, next_id = await self._load(table, name, spec)
            self.runtime.failures.pop(name, None)
            return self.runtime.change(table.changed(arms={**table.arms, name: served}, split={**table.split, name: 0.0}, next_id=next_id))

    async def replace(self, name: str, spec: str) -> Table:
        """New version under a new name and path, flip, retire: requests in flight finish on the old one."""
        start = time.perf_counter()
        with self.runtime.state.locked() as table, self._counted(start):
            old = _arm(table, name)
            served, next_id = await self._load(table, name, spec)
            changed = self.runtime.change(table.changed(arms={**table.arms, name: served}, next_id=next_id))
            self.runtime.failures.pop(name, None)
            self.runtime.experiment.forget(name)
            self._retire(old)
            return changed

    async def remove(self, name: str) -> Table:
        """Take an arm away; its weight must be 0 first, so that nobody is moved without being asked."""
        with self.runtime.state.locked() as table:
            old = _arm(table, name)
            if table.split.get(name):
                raise ConfigError(f"arm {name!r} has weight {table.split[name]:g}; set its weight to 0 first")
            if len(table.arms) == 1:
                raise ConfigError(f"{name!r} is the only arm; add another one first")
            keep = {each: served for each, served in table.arms.items() if each != name}
            changed = self.runtime.change(table.changed(arms=keep, split={each: table.split[each] for each in keep}))
            self.runtime.experiment.forget(name)
            self._retire(old)
            return changed

    async def _load(self, table: Table, name: str, spec: str) -> tuple[Served, int]:
        """An arm ready to serve, and the next free adapter id."""
        config = self.runtime.config
        arm = parse_arm(name, spec)
        if arm.kind != "lora":
            return Served(arm), table.next_id
        await self._adapters_allowed(table)
        directory = self.runtime.directory / "adapters"
        negation = await asyncio.to_thread(materialise, arm, config.model, directory, revision=config.revision, any_base=config.any_base)
        limit = self.runtime.args.max_lora_rank
        if negation.rank > int(limit):
            raise ConfigError(f"arm {name}: rank {negation.rank} is above this server's {limit}; restart it with --max-lora-rank {negation.rank} or more")
        served = Served(arm, str(negation.path), table.next_id)
        try:
            await self.runtime.load(served)
        except Exception as error:
            raise ConfigError(f"arm {name}: vLLM cannot load {arm.source}: {error}") from error
        return served, table.next_id + 1

    async def _adapters_allowed(self, table: Table) -> None:
        """Refuse what has no slot; versions about to be retired are waited for, since swaps may follow each other closely."""
        args = self.runtime.args
        if self.runtime.several:
            raise ConfigError("adapters cannot change at run time with several API servers, which do not know each other's requests in flight; restart with other arms")
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
            raise ConfigError(f"all but one of the {args.max_loras} adapter slots are taken, and one stays free; remove an arm, or restart with --max-loras {loaded + 2}")

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

    # ---- the whole model ----------------------------------------------------------------------------------------

    async def swap(self, source: dict[str, Any]) -> dict[str, Any]:
        """Serve other weights from this engine: base − scale·delta of an adapter, or a fused checkpoint's.

        Safe order: check on every rank, close the gate, drain, pause, load, drop every cached block, resume, compare a
        probe's log-probabilities, open the gate. Whatever fails, the base is loaded again and checked.

        Raises:
            InputError: it cannot work; nothing was touched. RunError: it failed; the base serves again.
        """
        with self.runtime.state.locked() as table:
            self._swap_allowed()
            start = time.perf_counter()
            with self._counted(start):
                await self._checked(source)
                expected = await self._expected(source, table)
                async with self._drained():
                    base = self.base_probe or await Probe.take(self.runtime)
                    self.base_probe = base
                    begun = time.perf_counter()
                    try:
                        await self._load_weights(source)
                        after = await Probe.take(self.runtime)
                        verify_swap(base, after, expected)
                    except Exception as error:
                        await self._back_to_base(error)
                        raise RunError(f"the swap failed, and the base serves again: {error}") from error
                    stalled = time.perf_counter() - begun
                    self.runtime.change(table.changed(swap=source))
        return {"swap": source, "seconds": time.perf_counter() - start, "stalled_seconds": stalled,
                "probe": {"from_base": distance(base, after), "from_expected": distance(expected, after) if expected else None}}

    async def restore(self) -> dict[str, Any]:
        """The base again, from its files: exact."""
        with self.runtime.state.locked() as table:
            if not table.swap and not self.runtime.broken:
                raise ConfigError("no whole-model swap is in force; there is nothing to restore")
            start = time.perf_counter()
            with self._counted(start):
                async with self._drained():
                    error = await self._restored()
                    if error:
                        self.runtime.broken = error
                        raise RunError(f"the base could not be restored: {error}; restart this server")
                    self.runtime.broken = None
                    self.runtime.change(table.changed(swap=None))
        off = distance(self.base_probe, await Probe.take(self.runtime)) if self.base_probe else None
        return {"swap": None, "seconds": time.perf_counter() - start, "probe": {"from_base": off}}

    def _swap_allowed(self) -> None:
        if self.runtime.several:
            raise ConfigError("a whole-model swap needs one API server, which knows every request in flight; restart without --api-server-count")
        if not getattr(self.runtime.args, "worker_extension_cls", None):
            raise ConfigError("this server's workers cannot swap; restart it with --worker-extension-cls sku_vllm.serving.swap.SkuWorkerExtension")
        if self.runtime.broken:
            raise ConfigError(f"the engine's weights are in an unknown state ({self.runtime.broken}); restore, or restart this server")

    async def _checked(self, source: dict[str, Any]) -> None:
        replies = await self.runtime.engine.collective_rpc("sku_check", args=(self._model(), source))
        wrong = [reply["error"] for reply in replies if not reply["ok"]]
        if wrong:
            raise InputError(wrong[0])

    def _model(self) -> str:
        from sku_vllm.checkpoint import checkpoint_directory

        return str(checkpoint_directory(self.runtime.config.model, self.runtime.config.revision))

    async def _expected(self, source: dict[str, Any], table: Table) -> Probe | None:
        """The probe through the same edit served as an adapter, where a slot is free: what the swap must then reproduce."""
        if "adapter" not in source or table.swap:
            return None
        try:
            served, _ = await self._load(table, "probe", f"lora:{source['adapter']}@{source['scale']}")
        except InputError:
            return None
        try:
            return await Probe.take(self.runtime, lora_request(served))
        finally:
            await self.runtime.engine.remove_lora(served.lora_id)

    def _drained(self) -> "Drained":
        return Drained(self.runtime)

    async def _load_weights(self, source: dict[str, Any] | None) -> None:
        """Pause, load on every rank, forget every cached block, resume. A failed load stays paused: its layers hold nothing."""
        engine = self.runtime.engine
        await engine.pause_generation(mode="wait", clear_cache=True)
        replies = await engine.collective_rpc("sku_swap", args=(self._model(), source))
        wrong = [reply["error"] for reply in replies if not reply["ok"]]
        if wrong:
            raise RunError("; ".join(dict.fromkeys(wrong)))
        if await engine.reset_prefix_cache(reset_running_requests=True) is not True:
            raise RunError("the prefix cache could not be dropped")
        if hasattr(engine, "update_weight_version"):
            await engine.update_weight_version("base" if source is None else f"sku-{self.runtime.table.generation + 1}")
        await engine.resume_generation()

    async def _back_to_base(self, cause: BaseException) -> None:
        error = await self._restored()
        if error:
            self.runtime.broken = error
            raise RunError(f"the swap failed ({cause}) and so did the way back ({error}); every arm of this engine answers 503 until a restart") from cause

    async def _restored(self) -> str | None:
        """Load the base and its arms again and compare the probe; what went wrong, or None."""
        try:
            await self._load_weights(None)
            if self.base_probe:
                off = distance(self.base_probe, await Probe.take(self.runtime))
                if off > 1e-3:
                    return f"the probe is {off:.2g} away from the base"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        await self._reload_arms()
        return None

    async def _reload_arms(self) -> None:
        """A reload of weights drops every adapter from the engine. One that cannot come back answers 503, the others serve."""
        for name, served in self.runtime.table.arms.items():
            if served.lora_id:
                try:
                    await self.runtime.load(served)
                    self.runtime.failures.pop(name, None)
                except Exception as error:
                    self.runtime.failures[name] = f"{type(error).__name__}: {error}"

    def _counted(self, start: float) -> Any:
        return Counted(self.runtime, start)


class Counted:
    """Counts a change of what is served by its outcome, and times the ones that worked."""

    def __init__(self, runtime: Runtime, start: float) -> None:
        self.metrics, self.start = runtime.metrics, start

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        outcome = "ok" if kind is None else "refused" if issubclass(kind, InputError | Busy) else "failed"
        self.metrics.swaps.labels(outcome).inc()
        if kind is None:
            self.metrics.swap_seconds.observe(time.perf_counter() - self.start)


class Drained:
    """Inside this block no request is on the engine, and new ones wait at the gate."""

    def __init__(self, runtime: Runtime, timeout: float = DRAIN) -> None:
        self.runtime, self.timeout = runtime, timeout

    async def __aenter__(self) -> None:
        self.runtime.gate.clear()
        deadline = time.monotonic() + self.timeout
        while any(self.runtime.in_flight.values()):
            if time.monotonic() > deadline:
                self.runtime.gate.set()
                raise RunError(f"requests were still running after {self.timeout:.0f} s; nothing was changed, try again when streams are shorter")
            await asyncio.sleep(0.005)

    async def __aexit__(self, *exception: object) -> None:
        self.runtime.gate.set()


def _arm(table: Table, name: str) -> Served:
    if name not in table.arms:
        raise ConfigError(f"unknown arm {name!r}; the arms are {', '.join(table.arms)}")
    return table.arms[name]


def verify_swap(base: Probe, after: Probe, expected: Probe | None) -> None:
    """The swapped engine answers with finite numbers, other ones than the base, and nearer to the edit than to the base.

    Raises:
        RunError: it does not.
    """
    if not after.finite:
        raise RunError("the probe's log-probabilities are not finite")
    if expected is not None:
        wanted, off = distance(base, expected), distance(expected, after)
        if off > max(1e-3, 0.5 * wanted):
            raise RunError(f"the probe is {off:.2g} away from the edit, which itself moves it by {wanted:.2g}")
