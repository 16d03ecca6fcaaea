"""A progress bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int, float], None]


@contextmanager
def bar(title: str, show: bool) -> Iterator[Report | None]:
    """Yield `report(step, steps, loss)`, or None where nothing is to be shown."""
    if not show:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=Console(stderr=True)) as progress:
            task = progress.add_task(title, loss="")
            yield lambda step, steps, loss: progress.update(task, completed=step, total=steps, loss=f"loss {loss:.3f}")
    else:
        yield _lines(title)


def _lines(title: str) -> Report:
    start = time.monotonic()

    def report(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 10) == 0:
            print(f"{title}: step {step} of {steps}, loss {loss:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    return report
