"""When the slot of a replaced adapter is free again."""

import asyncio
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

from sku_vllm.serving.arm_changes import ArmChanges
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

        async def remove_lora(number):
            unloaded.append(number)

        state, discarded = State(), []
        runtime = SimpleNamespace(state=state, in_flight=Counter({7: 1}), engine=SimpleNamespace(remove_lora=remove_lora))
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
