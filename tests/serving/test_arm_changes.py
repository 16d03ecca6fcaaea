"""When the slot of a replaced adapter is free again, and what of it is left in the metrics."""

import asyncio
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

from prometheus_client import REGISTRY, Gauge

from sku_vllm.serving.arm_changes import ArmChanges
from sku_vllm.serving.lora_series import GAUGE, forget_lora_series
from sku_vllm.serving.state import Busy


class State:
    """Held by another change, until `held` is False."""

    held = True

    @contextmanager
    def locked(self):
        if self.held:
            raise Busy("held")
        yield


def test_a_change_in_progress_does_not_keep_the_slot_of_a_replaced_adapter_taken():
    """That change may be waiting for the very slot: the copy on the disk goes when it is over, the slot at once."""

    async def scenario():
        unloaded = []

        async def unload(served):
            unloaded.append(served.lora_id)

        state, discarded = State(), []
        runtime = SimpleNamespace(state=state, in_flight=Counter({7: 1}), unload=unload)
        changes = ArmChanges(runtime)
        changes.discard = discarded.append
        old = SimpleNamespace(lora_id=7)
        changes._retire(old)
        await asyncio.sleep(0.2)
        assert len(changes.retiring) == 1 and not unloaded  # a request still uses it
        runtime.in_flight[7] = 0
        await asyncio.wait(changes.retiring, timeout=60)
        await asyncio.sleep(0)
        assert not changes.retiring and unloaded == [7] and not discarded
        state.held = False
        await asyncio.wait(changes.discarding, timeout=60)
        assert discarded == [old] and not changes.leaving

    asyncio.run(scenario())


def test_an_unloaded_adapter_leaves_vllm_s_metrics_and_others_stay():
    gauge = Gauge(GAUGE, "As vLLM has it.", ["max_lora", "waiting_lora_adapters", "running_lora_adapters"])
    try:
        for waiting, running in (("", ""), ("sku-a-7", ""), ("", "sku-b-8,sku-a-7"), ("sku-a-77", "sku-b-8")):
            gauge.labels("3", waiting, running).set_to_current_time()
        forget_lora_series("sku-a-7")
        left = [tuple(sample.labels.values()) for sample in gauge.collect()[0].samples]
        assert left == [("3", "", ""), ("3", "sku-a-77", "sku-b-8")]
    finally:
        REGISTRY.unregister(gauge)
