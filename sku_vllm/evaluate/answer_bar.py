"""Progress display of measurements: a bar on a terminal, a line every 15 seconds in a log, or nothing."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sku_vllm.evaluate.backend import Progress

LOG_EVERY_S = 15.0
RATE_OVER_S = 120.0  # the time left follows the speed of this long

# A context manager made from the work to come and a title. It yields a function to call with the work done since the last call.
Bar = Callable[[float, str], AbstractContextManager[Progress]]
# A function that shows one line of text; called before each of several measurements.
Say = Callable[[str], None]


def silent(line: str) -> None:
    """A `Say` that says nothing."""


@contextmanager
def no_bar(total: float, title: str) -> Iterator[Progress]:
    """A `Bar` that shows nothing."""
    yield lambda work: None


@contextmanager
def answer_bar(total: float, title: str) -> Iterator[Progress]:
    """Progress over `total` units of work (work.py) on stderr, with the time left."""
    if not sys.stderr.isatty():
        yield _log_lines(total, title)
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    with RichProgress(console=Console(stderr=True), transient=True, speed_estimate_period=RATE_OVER_S) as bar:
        task = bar.add_task(title, total=total)
        yield lambda work: bar.advance(task, work)


def _log_lines(total: float, title: str) -> Progress:
    done, said = 0.0, time.monotonic()
    seen = deque([(said, 0.0)])  # when how much was done: the last RATE_OVER_S seconds, so that answers kept of an earlier run wear off

    def advance(work: float) -> None:
        nonlocal done, said
        done += work
        now = time.monotonic()
        seen.append((now, done))
        while len(seen) > 2 and now - seen[1][0] > RATE_OVER_S:
            seen.popleft()
        if now - said > LOG_EVERY_S:
            said = now
            begun, before = seen[0]
            left = round((total - done) * (now - begun) / max(done - before, 1e-9))
            print(f"{title}: {done / total:.0%} done, {left // 60:02d}:{left % 60:02d} left", file=sys.stderr, flush=True)

    return advance
