"""Replaces the weights of a running engine (a whole-model swap), verifies them by a probe's log-probabilities, and can undo it exactly.

This is the API server's part; what each worker does is in `worker_extension.py`.
"""

import asyncio
import json
import time
from typing import Any

from sku_vllm.errors import ConfigError, InputError, RunError
from sku_vllm.serving.arm_changes import ArmChanges, Counted, Staged
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.state import Table, version_of
from sku_vllm.serving.traffic import lora_request
from sku_vllm.serving.weight_probe import Probe, distance

DRAIN = 120.0  # seconds a swap waits for running requests


class ModelSwap:
    """Whole-model swaps of one server."""

    def __init__(self, runtime: Runtime, changes: ArmChanges) -> None:
        self.runtime, self.changes = runtime, changes
        self.base_probe: Probe | None = None

    async def swap(self, source: dict[str, Any]) -> dict[str, Any]:
        """Serve other weights from this engine: base − scale·delta of an adapter, or a fused checkpoint's.

        Steps: every rank checks the source, new requests are held back, running ones finish, the engine pauses and loads the
        weights, the prefix cache is dropped, the engine resumes, a probe's log-probabilities are compared, requests go on. If a
        step fails, the base is loaded again and checked.

        Raises:
            InputError: the swap cannot work; nothing was changed. RunError: it failed; the base serves again.
        """
        with self.runtime.state.locked() as table:
            self._swap_allowed()
            start = time.perf_counter()
            with Counted(self.runtime):
                in_place = await self._checked(source)
                expected = await self._expected(source, table)
                async with Staged(self.runtime, swapped_to(table, source)) as staged, Drained(self.runtime):
                    base = self.base_probe or await Probe.take(self.runtime)
                    self.base_probe = base
                    begun = time.perf_counter()
                    try:
                        await self._load_weights(source, in_place)
                        after = await Probe.take(self.runtime)
                        verify_swap(base, after, expected)
                        stalled = time.perf_counter() - begun
                        await staged.commit()
                    except Exception as error:
                        await self._back_to_base(error)
                        if table.swap:  # going back to the base has also undone an earlier swap
                            self._forget_swap(table)
                        raise RunError(f"the swap failed, and the base serves again: {error}") from error
                    seconds = time.perf_counter() - start
                    self.runtime.metrics.swap_seconds.observe(seconds)
        return {
            "swap": source,
            "seconds": seconds,
            "stalled_seconds": stalled,
            "in_place": in_place,
            "probe": {"from_base": distance(base, after), "from_expected": distance(expected, after) if expected else None},
        }

    async def check(self, source: dict[str, Any]) -> dict[str, Any]:
        """Only check that a swap to this source would work. Raises InputError where it would not."""
        with self.runtime.state.locked() as table:
            self._swap_allowed()
            return {"swap": table.swap, "in_place": await self._checked(source)}

    async def restore(self) -> dict[str, Any]:
        """Load the base's weights again from its files, which is exact. Raises RunError when that fails."""
        with self.runtime.state.locked() as table:
            if not table.swap and not self.runtime.broken:
                raise ConfigError("no whole-model swap is in force; there is nothing to restore")
            start = time.perf_counter()
            with Counted(self.runtime):
                async with Staged(self.runtime, table.changed(swap=None, swapped="")) as staged, Drained(self.runtime):
                    error = await self._restored()
                    if error:
                        self.runtime.broken = error
                        raise RunError(f"the base could not be restored: {error}; restart this server")
                    off = distance(self.base_probe, await Probe.take(self.runtime)) if self.base_probe else None
                    try:
                        await staged.commit()
                    except RunError as failure:  # the table still says `swapped`, but the engine holds the original weights again
                        self.runtime.broken = str(failure)
                        raise
                    self.runtime.broken = None
        return {"swap": None, "seconds": time.perf_counter() - start, "probe": {"from_base": off}}

    def _swap_allowed(self) -> None:
        if self.runtime.several:
            raise ConfigError(
                "a whole-model swap needs one API server, which knows every request in flight; restart without --api-server-count"
            )
        if (getattr(self.runtime.args, "data_parallel_size", None) or 1) > 1:
            raise ConfigError(
                "a whole-model swap needs one engine: with data parallelism vLLM reports the first rank's outcome only, "
                "so a rank that failed would serve other weights unnoticed; restart with --data-parallel-size 1"
            )
        if not getattr(self.runtime.args, "worker_extension_cls", None):
            raise ConfigError(
                "this server's workers cannot swap; restart it with --worker-extension-cls "
                "sku_vllm.serving.worker_extension.SkuWorkerExtension"
            )
        if self.runtime.broken:
            raise ConfigError(f"the engine's weights are in an unknown state ({self.runtime.broken}); restore, or restart this server")

    async def _checked(self, source: dict[str, Any]) -> bool:
        """Whether every rank can edit its weights in place. Raises InputError when a rank says that the swap cannot work."""
        replies = await self.runtime.engine.collective_rpc("sku_check", args=(self._model(), source))
        wrong = [reply["error"] for reply in replies if not reply["ok"]]
        if wrong:
            raise InputError(wrong[0])
        return all(reply["in_place"] for reply in replies)

    def _model(self) -> str:
        from sku_vllm.checkpoint.reader import checkpoint_directory

        return str(checkpoint_directory(self.runtime.config.model, self.runtime.config.revision))

    async def _expected(self, source: dict[str, Any], table: Table) -> Probe | None:
        """The probe's result with the same edit loaded as a LoRA adapter, which the swap must reproduce; None where no slot is free."""
        if "adapter" not in source or table.swap:
            return None
        try:
            served, _ = await self.changes.prepare(table, "probe", f"lora:{source['adapter']}@{source['scale']}")
            await self.changes.load(served)
        except InputError:
            return None
        try:
            return await Probe.take(self.runtime, lora_request(served))
        finally:
            await self.runtime.engine.remove_lora(served.lora_id)
            self.changes.discard(served)

    async def _load_weights(self, source: dict[str, Any] | None, in_place: bool = False) -> None:
        """Pause the engine, load the weights on every rank, drop the prefix cache, resume.

        After a failed load the engine stays paused, since its layers may be empty. Raises RunError.
        """
        engine = self.runtime.engine
        await engine.pause_generation(mode="wait", clear_cache=True)
        replies = await engine.collective_rpc("sku_swap", args=(self._model(), source, in_place))
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
            raise RunError(
                f"the swap failed ({cause}) and so did the way back ({error}); every arm of this engine answers 503 until a restart"
            ) from cause

    def _forget_swap(self, table: Table) -> None:
        """Write the table without its swap; if that fails, mark the engine broken, so that no request is answered as `swapped`."""
        try:
            self.runtime.change(table.changed(swap=None, swapped=""))
        except OSError as error:
            self.runtime.broken = f"{self.runtime.state.path}: {error.strerror}"

    async def _restored(self) -> str | None:
        """Load the base and the arms' adapters again and compare the probe. Returns None, or what went wrong."""
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
        """Load the arms' adapters again, which a reload of weights has dropped. An arm whose adapter fails answers 503 from then on."""
        for name, served in self.runtime.table.arms.items():
            if served.lora_id:
                try:
                    await self.runtime.load(served)
                    self.runtime.failures.pop(name, None)
                except Exception as error:
                    self.runtime.failures[name] = f"{type(error).__name__}: {error}"


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
                raise RunError(
                    f"requests were still running after {self.timeout:.0f} s; nothing was changed, try again when streams are shorter"
                )
            await asyncio.sleep(0.005)

    async def __aexit__(self, *exception: object) -> None:
        self.runtime.gate.set()


def swapped_to(table: Table, source: dict[str, Any]) -> Table:
    """The table while these weights are in force. They have a version of their own, like an arm."""
    version = version_of(json.dumps(source, sort_keys=True), table.next_id)
    return table.changed(swap=source, swapped=version, next_id=table.next_id + 1)


def verify_swap(base: Probe, after: Probe, expected: Probe | None) -> None:
    """Check the probe after a swap: it is finite and, where `expected` is known, closer to that than half the edit's own effect.

    Raises:
        RunError: it is not.
    """
    if not after.finite:
        raise RunError("the probe's log-probabilities are not finite")
    if expected is not None:
        wanted, off = distance(base, expected), distance(expected, after)
        if off > max(1e-3, 0.5 * wanted):
            raise RunError(f"the probe is {off:.2g} away from the edit, which itself moves it by {wanted:.2g}")
