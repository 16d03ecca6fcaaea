"""Progress while a long file is read: a bar on a terminal, a line every 15 seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 10_000  # records between two looks at the clock
QUIET_S = 2.0  # a file that takes less shows no bar
LOG_EVERY_S = 15.0
Numbered = Iterator[tuple[int, dict[str, Any]]]


@contextmanager
def reading_bar(name: str, total: int | None) -> Iterator[Callable[[Numbered], Numbered]]:
    """A function that passes records on and shows how many. total: how many there will be, None where that is not known."""
    if not sys.stderr.isatty():
        yield lambda records: _with_lines(records, name, total)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    look = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} rows read"), TimeElapsedColumn())
    bar = Progress(*look, console=Console(stderr=True), transient=True)
    try:
        yield lambda records: _with_bar(records, bar, name, total)
    finally:
        bar.stop()


def _with_lines(records: Numbered, name: str, total: int | None) -> Numbered:
    said = time.monotonic()
    for count, record in enumerate(records, 1):
        if count % EVERY == 0 and time.monotonic() - said > LOG_EVERY_S:
            said = time.monotonic()
            print(f"{name}: {count}{f' of {total}' if total else ''} rows read", file=sys.stderr, flush=True)
        yield record


def _with_bar(records: Numbered, bar: Any, name: str, total: int | None) -> Numbered:
    began, task = time.monotonic(), None
    for count, record in enumerate(records, 1):
        if count % EVERY == 0 and time.monotonic() - began > QUIET_S:
            if task is None:
                bar.start()
                task = bar.add_task(name, total=total)
            bar.update(task, completed=count)
        yield record
