"""Make Ctrl-C and SIGTERM end a command wherever it is, so that partial files are removed and servers are stopped."""

import _thread
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SOON = 0.01  # seconds until a lost interrupt is raised again


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
        # Not at once: what this hook raises is dropped too.
        threading.Timer(SOON, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)
