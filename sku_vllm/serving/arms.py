"""What can answer a request: the model as it is, the model minus an adapter, or another server.

This file parses and checks text. Of the disk it asks which directories there are (`split_at_scale`), and `scale_looked_up` reads the
file that `sku tune` wrote into an adapter's directory.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sku_vllm.adapter_at_scale import TUNED, join_at_scale, split_at_scale
from sku_vllm.client.url import http_url
from sku_vllm.errors import ConfigError

ALIAS = "sku"
SWAPPED = "swapped"
# Arm names become metric labels, model names and headers. At most 32 arms keep the number of time series small.
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
MAX_ARMS = 32
FORMS = "NAME=base, NAME=lora:ADAPTER@SCALE (or @tuned) or NAME=upstream:URL#MODEL"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of answering.

    kind: "base", "lora" (base − scale·delta of the adapter at `source`) or "upstream" (`source` is a URL, `model` its model).
    """

    name: str
    kind: str
    source: str = ""
    scale: float = 0.0
    model: str = ""

    @property
    def spec(self) -> str:
        """The text after `NAME=` that makes this arm again."""
        if self.kind == "lora":
            return f"lora:{join_at_scale(self.source, self.scale)}"
        return f"upstream:{self.source}#{self.model}" if self.kind == "upstream" else "base"

    @property
    def on_engine(self) -> bool:
        """Whether this vLLM's own weights answer."""
        return self.kind != "upstream"


def parse_arm(name: str, spec: str) -> Arm:
    """One `--arm NAME=SPEC`.

    Raises:
        ConfigError: SPEC has none of the forms in `FORMS`, the name cannot be a label, the scale is not a number in [0, 10], or
            `ADAPTER@SCALE` is the name of a directory while ADAPTER is one too.
    """
    where = f"--arm {name}={spec}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: an arm's name is 1-48 of a-z, 0-9, '.', '_', '-', starting with a letter or digit")
    if name in (ALIAS, SWAPPED):
        raise ConfigError(f"{where}: {name!r} is reserved; choose another name")
    kind, _, rest = spec.partition(":")
    if spec == "base":
        return Arm(name, "base")
    if kind == "lora" and rest:
        return Arm(name, "lora", *_adapter_at_scale(rest, where))
    if kind == "upstream" and rest:
        url, separator, model = rest.rpartition("#")
        if not separator or not model or not http_url(url):
            raise ConfigError(f"{where}: write upstream:http://HOST:PORT/v1#MODEL")
        return Arm(name, "upstream", url.rstrip("/"), model=model)
    raise ConfigError(f"{where}: no such kind of arm; write {FORMS}")


def _adapter_at_scale(text: str, where: str) -> tuple[str, float]:
    """The adapter's path and its scale, which an arm has to name: a directory of exactly that name is an adapter without a scale."""
    source, scale = split_at_scale(text, prefix="lora:")
    if scale is not None:
        return source, quantised(scale, where)
    path, separator, word = text.rpartition("@")
    if separator and path and not os.path.isdir(text):
        return path, quantised(word, where)  # says that it is not a number
    raise ConfigError(f"{where}: which scale? write lora:{text}@1.0")


def scale_looked_up(spec: str, where: str) -> str:
    """Replace `lora:ADAPTER@tuned` by what `sku tune` chose, such as `lora:ADAPTER@0.75`; return any other spec unchanged.

    Args:
        where: the flag or request, for the error.

    Raises:
        ConfigError: `sku tune` has not been run on that adapter, no scale was within its limits, or `ADAPTER@SCALE` is the name of a
            directory while ADAPTER is one too.
    """
    if not spec.startswith("lora:"):
        return spec
    path, text = split_at_scale(spec.removeprefix("lora:"), tuned=True, prefix="lora:")
    if text != TUNED:
        return spec
    from sku_vllm.records import tuned_arm

    choice = tuned_arm(path, where)
    return f"lora:{join_at_scale(choice.adapter, choice.scale)}"


def quantised(scale: float | str, where: str) -> float:
    """The scale rounded to 0.01. This bounds how many negated copies of an adapter clients and operators can cause to be written (1001).

    Raises:
        ConfigError: not a finite number in [0, 10].
    """
    try:
        value = round(float(scale), 2)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: the scale {scale!r} is not a number; write for instance @1.0") from None
    if not math.isfinite(value) or not 0 <= value <= 10:
        raise ConfigError(f"{where}: the scale must lie between 0 and 10, not {scale}")
    return value


def parse_arms(specs: Sequence[str]) -> dict[str, Arm]:
    """All `--arm NAME=SPEC` in the order given.

    Raises:
        ConfigError: as `parse_arm`; none given; a name twice; too many.
    """
    arms: dict[str, Arm] = {}
    for text in specs:
        name, separator, spec = text.partition("=")
        if not separator:
            raise ConfigError(f"--arm {text}: write {FORMS}")
        if name in arms:
            raise ConfigError(f"--arm {text}: the name {name!r} is given twice")
        arms[name] = parse_arm(name, spec)
    if not arms:
        raise ConfigError(f"no arms: give at least one --arm {FORMS}")
    if len(arms) > MAX_ARMS:
        raise ConfigError(f"--arm: {len(arms)} arms; at most {MAX_ARMS}, since each is a label of every metric")
    return arms


def parse_split(text: str | None, arms: Sequence[str]) -> dict[str, float]:
    """`NAME=WEIGHT,…` as weights in the arms' declared order; without text equal shares; arms left out get 0.

    Raises:
        ConfigError: see `check_split`.
    """
    if not text:
        return {name: 1 / len(arms) for name in arms}
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = part.strip().partition("=")
        try:
            weight = float(value)
        except ValueError:
            separator = ""
        if not separator or name in weights:
            raise ConfigError(f"--split {text}: write each arm once, as NAME=WEIGHT,NAME=WEIGHT")
        weights[name] = weight
    return check_split(weights, arms, f"--split {text}")


def check_split(weights: Mapping[str, float], arms: Sequence[str], where: str) -> dict[str, float]:
    """The weights in the arms' order, zero where not named.

    Raises:
        ConfigError: an unknown arm, a weight outside [0, 1], a sum that is not 1.
    """
    for name, weight in weights.items():
        if name not in arms:
            raise ConfigError(f"{where}: unknown arm {name!r}; the arms are {', '.join(arms)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or not 0 <= weight <= 1:
            raise ConfigError(f"{where}: the weight of {name!r} must lie between 0 and 1, not {weight}")
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"{where}: the weights sum to {total:g}; they must sum to 1")
    return {name: float(weights.get(name, 0.0)) for name in arms}
