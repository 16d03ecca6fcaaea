"""The option `--tuned DIR`, which takes adapter and scale from an output of `sku tune` instead of `--adapter` and `--scale`."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from sku_vllm.errors import ConfigError
from sku_vllm.records.tuned import Tuned, read_tuned

MISSING_ADAPTER = "--adapter: is missing; give an adapter directory, or --tuned DIR with what sku tune wrote"


def tuned_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The click option, for commands that subtract an adapter."""
    text = "Output of sku tune: take its adapter and scale, instead of --adapter and --scale."
    return click.option("--tuned", type=click.Path(file_okay=False), metavar="DIR", help=text)


def read_choice(tuned: str, by_hand: Mapping[str, object]) -> Tuned:
    """The adapter and scale of `--tuned`.

    Args:
        by_hand: the flags that `--tuned` replaces, with their values; None and () mean not given.

    Raises:
        ConfigError: one of them is given too; and see `read_tuned`.
    """
    given = [flag for flag, value in by_hand.items() if value is not None and value != ()]
    if given:
        raise ConfigError(f"--tuned {tuned}: names the adapter and the scale that tune chose; leave {' and '.join(given)} out, or --tuned")
    return read_tuned(tuned)
