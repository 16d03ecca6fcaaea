"""Which sequences go through a model together: of similar length, bounded in rows and in padded tokens, halved where memory runs out.

Open this file to change how batches are cut.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch


def cut_batches(order: Sequence[int], sizes: Sequence[float], *, rows: int) -> Iterator[list[int]]:
    """Cut the item numbers `order` into batches of at most `rows` items that fit together, at least one item each.

    Args:
        sizes: by item number, what share of a batch it takes. Items are padded, so each takes as much as the largest of its batch.
    """
    batch: list[int] = []
    largest = 0.0
    for item in order:
        largest = max(largest, sizes[item])
        if batch and (len(batch) >= rows or (len(batch) + 1) * largest > 1):
            yield batch
            batch, largest = [], sizes[item]
        batch.append(item)
    if batch:
        yield batch


def run_batches(batches: Iterable[list[int]], run: Callable[[list[int]], None]) -> None:
    """Run every batch. One that memory does not suffice for is run in halves, and so are those after it, which a line on stderr says.

    Raises:
        RuntimeError: memory does not suffice for a single item; or whatever `run` raises.
    """
    share = 1  # into how many parts a batch is cut
    for batch in batches:
        size = -(-len(batch) // share)
        while batch:
            if _fits(batch[:size], run):
                batch = batch[size:]
                continue
            share, size = 2 * share, -(-size // 2)
            print(f"memory does not suffice for that many sequences at a time; going on with {size}", file=sys.stderr, flush=True)


def _fits(batch: list[int], run: Callable[[list[int]], None]) -> bool:
    """Run a batch; False where it ran out of memory and can be made smaller. What it held is free again when this returns."""
    try:
        run(batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if len(batch) == 1 or not _out_of_memory(error):
            raise
        return False
    return True


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # a CPU allocation has no class of its own
