"""Make Ctrl-C and SIGTERM end a command wherever it is, so that partial files are removed and servers are stopped."""

import _thread
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SOON = 0.05  # seconds until a lost interrupt is raised again


def raise_interrupts() -> None:
    """Handle SIGTERM like Ctrl-C, and raise the KeyboardInterrupt of either again where Python drops it.

    An exception raised while an object is finalised (`__del__`, a weak reference's callback) only reaches `sys.unraisablehook`. A signal
    that arrives just then would do nothing.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _raise_again


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _raise_again(lost: "UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # Not at once, and without waiting for the thread to start, as threading's classes do: what this hook raises is dropped too.
        _thread.start_new_thread(_interrupt_soon, ())
    else:
        sys.__unraisablehook__(lost)


def _interrupt_soon() -> None:
    time.sleep(SOON)
    # A signal to the main thread also ends what it waits for; _thread.interrupt_main would be noticed after the wait.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
