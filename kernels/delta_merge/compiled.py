"""A numba function compiled once a machine, saying so, and kept on disk; a place that cannot be written is no reason to fail.

numba keeps it below NUMBA_CACHE_DIR where that is set, else in `__pycache__` beside the source, else in the user's cache directory.
It renames whole files into place, but does not sync them: after a power cut one may be there and empty.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
from numba.core import event

# Its warnings reach stderr where nobody has set up logging, as in `sku`, and a server's log elsewhere.
logger = logging.getLogger(__name__)


class _Watch(event.Listener):
    """Says once that numba compiles: for seconds, or a minute on a busy machine, nothing else will be seen to happen."""

    def __init__(self) -> None:
        self.began: float | None = None

    def on_start(self, event: event.Event) -> None:
        if self.began is None:
            self.began = time.perf_counter()
            logger.warning("compiling the merge for this machine's CPU: once, some seconds (a minute where the CPU is busy)")

    def on_end(self, event: event.Event) -> None:
        """Nested functions end too; only the caller knows when all of it is done."""


def compiled(function: Callable, signatures: Sequence) -> Callable:
    """`function` in machine code for `signatures`, run without the GIL: as kept by an earlier process, else compiled now and kept."""
    watch = _Watch()
    with event.install_listener("numba:compile", watch):
        try:
            kernel, where = _kept(function, signatures)
        except Exception as error:  # no directory, a full disk, or files that unpickle to anything
            kernel, where = numba.njit(signatures, nogil=True)(function), None
            reason = f"{type(error).__name__}: {error}"
    if where is None:
        logger.warning("the compiled merge was not kept (%s), so it will be compiled again; NUMBA_CACHE_DIR names a place for it", reason)
    elif watch.began is not None:
        logger.warning("compiled in %.1f s, kept in %s", time.perf_counter() - watch.began, where)
    return kernel


def _kept(function: Callable, signatures: Sequence) -> tuple[Callable, str]:
    """The compiled function and the directory that keeps it. On an error what it kept is removed, so that the next process starts anew."""
    kernel = numba.njit(nogil=True, cache=True)(function)
    where = kernel.stats.cache_path
    try:
        for signature in signatures:
            kernel.compile(signature)
    except Exception:
        for file in Path(where).glob(f"*.{function.__name__}-*.nb[ic]"):
            with contextlib.suppress(OSError):
                file.unlink()
        raise
    kernel.disable_compile()
    return kernel, where
