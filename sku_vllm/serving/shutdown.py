"""SIGTERM: this process takes no new request, answers those that are running, and only then lets vLLM end the engine.

vLLM's own --shutdown-timeout tells the engine first, which gives up what it has not taken from its queue yet: such a request answers 200
with no tokens (vLLM 0.32.0). What still runs when the time is over waits for ever, and vLLM's HTTP server waits for it.
"""

import asyncio
import threading
import time
from typing import Any

from sku_vllm.serving.runtime import Runtime

TEARDOWN = 5.0  # seconds that the engine gets to end at least, as vLLM gives it where nothing is said

# Seconds before --shutdown-timeout at which one of several API servers tells its clients: the process that started them kills them then.
SPARE = 2.0


def answer_before_shutdown(engine_client: Any, runtime: Runtime) -> None:
    """Replace `engine_client.shutdown` on the instance, to be called in the event loop's thread.

    On SIGTERM vLLM calls it in another thread, with --shutdown-timeout, and serves on meanwhile; that call waits for the requests. Any
    other call ends the engine at once.
    """
    inner, loop, home = engine_client.shutdown, asyncio.get_running_loop(), threading.get_ident()

    def shutdown(timeout: float | None = None) -> None:
        if threading.get_ident() == home:
            inner(timeout=timeout)
            return
        if timeout:
            deadline = time.monotonic() + timeout
            spare = min(SPARE, timeout / 4) if runtime.several else 0
            asyncio.run_coroutine_threadsafe(answered(runtime, timeout - spare), loop).result()
            timeout = max(deadline - time.monotonic(), TEARDOWN)
        inner(timeout=timeout)
        loop.call_soon_threadsafe(fail_unanswered, engine_client, runtime)

    engine_client.shutdown = shutdown


async def answered(runtime: Runtime, timeout: float) -> None:
    """Refuse new requests from now on, and wait until the running ones are answered, at most `timeout` seconds.

    It runs in the event loop, as the middleware does: no request can slip in between its look at `closing` and being counted.
    """
    runtime.closing = True
    deadline = time.monotonic() + timeout
    while runtime.requests and time.monotonic() < deadline:
        await asyncio.sleep(0.05)


def fail_unanswered(engine_client: Any, runtime: Runtime) -> None:
    """Tell the requests that still wait for the engine that it is gone, as vLLM does where the engine dies; they answer 503.

    So do those that wait for another server: vLLM's HTTP server would wait for them without an end.
    """
    for relay in runtime.relays:
        relay.cancel()
    from vllm.v1.engine.exceptions import EngineDeadError

    engine_client.output_processor.propagate_error(EngineDeadError())
