"""Progress display of pretraining: a bar for each model on a terminal, a line after every tenth of the steps in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Report = Callable[[str, int, int, float], None]


@contextmanager
def progress_of(names: Sequence[str], show: bool) -> Iterator[Report]:
    """Yield `report(name, step, steps, loss)`, to be called after every step of a model."""
    if not show:
        yield lambda name, step, steps, loss: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=Console(stderr=True)) as progress:
            tasks = {name: progress.add_task(f"pretraining {name}", total=None, loss="") for name in names}

            def report(name: str, step: int, steps: int, loss: float) -> None:
                progress.update(tasks[name], completed=step, total=steps, loss=f"loss {loss:.3f}")

            yield report
    else:
        yield _lines()


def _lines() -> Report:
    start = time.monotonic()

    def report(name: str, step: int, steps: int, loss: float) -> None:
        if step * 10 % steps == 0:
            seconds = time.monotonic() - start
            print(f"pretraining {name}: step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    return report
