"""Records which functions of this project are handed one value while a command runs, in the order in which they are first entered.

Open it to change what counts as being handed a value; walk.py has the values and commands.
"""

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Where this project's functions are, and what the lists call these folders.
FOLDERS = {ROOT / "sku_vllm": "", ROOT / "cli": "cli/", ROOT / "kernels": "kernels/"}
# Objects that are looked into: those of this project, and what click hands a command.
OPENED = ("sku_vllm", "click")
VARIABLE = 0x04 | 0x08  # the flags of code with *args, and with **kwargs


@dataclass(frozen=True, slots=True)
class Step:
    """A function that is handed the value: its file as the lists call it, and its qualified name."""

    file: str
    function: str


@dataclass(frozen=True, slots=True)
class Value:
    """What is followed. Each of its forms counts alone or inside something: a text in a longer one, token ids in a list or a tensor.

    Attributes:
        texts, tokens, numbers: its forms.
    """

    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[float, ...] = ()

    def within(self, thing: Any) -> bool:
        """Whether it is the thing, or in something that the thing holds."""
        return self._within(thing, set())

    def _within(self, thing: Any, seen: set[int]) -> bool:
        if thing is None or isinstance(thing, bool | bytes | type | CodeType) or id(thing) in seen:
            return False
        if isinstance(thing, str):
            return any(text in thing for text in self.texts)
        if isinstance(thing, int | float):
            return thing in self.numbers
        seen.add(id(thing))
        if type(thing).__name__ in ("Tensor", "ndarray") and type(thing).__module__ in ("torch", "numpy"):
            return bool(self.tokens) and not str(thing.dtype).rpartition(".")[2].startswith("float") and self._within(thing.tolist(), seen)
        if isinstance(thing, Mapping):
            return any(self._within(part, seen) for pair in list(thing.items()) for part in pair)
        if isinstance(thing, list | tuple | set | frozenset):
            if thing and all(type(item) is int for item in thing):
                return self._among(thing)
            return any(self._within(part, seen) for part in thing)
        return any(self._within(part, seen) for part in _parts(thing))

    def _among(self, items: Collection[int]) -> bool:
        """Whether whole numbers hold a number, or the tokens of one form side by side. Apart, since most of what is looked at is tokens."""
        written = f" {' '.join(map(str, items))} "
        return any(f" {' '.join(map(str, form))} " in written for form in self.tokens) or any(number in items for number in self.numbers)


def _parts(thing: Any) -> list[Any]:
    """The attributes of an object of this project or of click."""
    if not type(thing).__module__.startswith(OPENED):
        return []
    if is_dataclass(thing):
        return [getattr(thing, one.name, None) for one in fields(thing)]
    return list(getattr(thing, "__dict__", {}).values())


def record_walk(run: Callable[[], object], value: Value) -> list[Step]:
    """The functions of this project that are handed the value while `run` runs, in the order in which they are first entered.

    Lambdas and comprehensions are left out. What an iterator will give is not looked at. Functions behind a cache that is warm are not
    entered, so a walk is to be recorded in a process of its own.
    """
    steps: dict[CodeType, Step] = {}
    called = cache(_called)  # asked at every call of any function

    def entered(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code in steps or code.co_name.startswith("<"):
            return
        file = called(code.co_filename)
        if file is None:
            return
        count = code.co_argcount + code.co_kwonlyargcount + (code.co_flags & VARIABLE).bit_count()
        given = frame.f_locals
        if any(value.within(given.get(name)) for name in code.co_varnames[:count]):
            steps[code] = Step(file, code.co_qualname)

    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # as sys.setprofile takes it
    return list(dict.fromkeys(steps.values()))


def _called(path: str) -> str | None:
    """How the lists call a file; None for one that is not of this project."""
    file = Path(path)
    return next((name + file.relative_to(folder).as_posix() for folder, name in FOLDERS.items() if file.is_relative_to(folder)), None)


def counts(steps: Iterable[Step]) -> dict[str, int]:
    """functions, files, and returns: entries into a file that had been left."""
    walked = list(steps)
    files = {step.file for step in walked}
    entries = sum(one is None or one.file != other.file for one, other in zip([None, *walked], walked, strict=False))
    return {"functions": len(walked), "files": len(files), "returns": entries - len(files)}


def listing(steps: Iterable[Step]) -> str:
    """A line a function, with its file where that changes."""
    lines, last = [], ""
    for step in steps:
        lines.append(f"{step.file if step.file != last else '':<36} {step.function}")
        last = step.file
    return "\n".join(lines)
