"""A bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sku_vllm.evaluate.backend import Progress

LOG_EVERY_S = 15.0


@contextmanager
def answer_bar(total: int, title: str) -> Iterator[Progress]:
    """Progress over `total` answers on stderr."""
    if not sys.stderr.isatty():
        yield _log_lines(total, title)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _log_lines(total: int, title: str) -> Progress:
    state = {"done": 0, "said": time.monotonic()}

    def advance(count: int) -> None:
        state["done"] += count
        if time.monotonic() - state["said"] > LOG_EVERY_S:
            state["said"] = time.monotonic()
            print(f"{title}: {state['done']} of {total} answers", file=sys.stderr, flush=True)

    return advance
