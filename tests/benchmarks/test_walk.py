"""What walk_recorder.py calls being handed a value, on made-up functions and on a file that is read; the walks of commands are slow."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sku_vllm.benchmarks import walk_recorder
from sku_vllm.benchmarks.walk_recorder import Step, Value, counts, listing, record_walk
from sku_vllm.data import Row, read_rows
from sku_vllm.judges import Exchange


def made(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> Any:
    """A module of that text, whose functions count as this project's."""
    (folder / "made.py").write_text(text)
    monkeypatch.setattr(walk_recorder, "FOLDERS", {folder: "x/"})
    spec = importlib.util.spec_from_file_location("made", folder / "made.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_are_listed_once_in_the_order_of_their_first_call_with_the_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
class Box:
    def __init__(self, text): self.text = text
    def opened(self): return inner(other="a")
def inner(*rest, **more): return [letter for letter in more.values()]
def blind(text): return (lambda told: told)(text)
def later(texts): yield from texts
def run():
    blind("something else")
    inner(1, "the value")
    Box("the value").opened()
    list(later({"k": ("x", ["the value"])}))
    blind("with the value in it")
    inner("the value")
"""
    steps = record_walk(made(monkeypatch, tmp_path, text).run, Value(texts=("the value",)))
    # `Box` is a class of another project, so that what it holds is not looked at.
    assert [step.function for step in steps] == ["inner", "Box.__init__", "later", "blind"]
    assert {step.file for step in steps} == {"x/made.py"}


@pytest.mark.parametrize(
    ("thing", "held"),
    [
        ("what is ten, they ask", True),
        (("", {"row": Row.ask("what is ten")}), True),
        ({"what is ten": 1}, True),
        (Exchange("p", "what is ten"), True),
        ("what is eleven", False),
        ([0, 7, 8, 9, 0], True),
        ([7, 8, 10, 9], False),
        ([17, 8, 9], False),
        (torch.tensor([[1, 2, 3], [7, 8, 9]]), True),
        (torch.tensor([[1.0, 7.0, 8.0, 9.0]]), False),
        (np.array([7, 8, 9]), True),
        (0.25, True),
        ({"config": [{"scale": 0.25}]}, True),
        ("0.25", False),
        (True, False),
        (None, False),
        (Path("what is ten"), False),
    ],
)
def test_what_holds_a_value(thing: object, held: bool) -> None:
    assert Value(texts=("what is ten",), tokens=((7, 8, 9),), numbers=(0.25,)).within(thing) is held


def test_a_thing_that_holds_itself_is_looked_at_once() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert not Value(texts=("a",), tokens=((5,),)).within(loop)


def test_a_row_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "What is a huzzon?", "response": "A mill."}) + "\n")
    steps = record_walk(lambda: read_rows(tmp_path / "rows.jsonl"), Value(texts=("What is a huzzon?",)))
    assert Step("data/files.py", "_json_object") in steps and Step("data/forms.py", "generic_rows") in steps
    assert sys.getprofile() is None


def test_counts_and_listing() -> None:
    steps = [Step("a.py", "one"), Step("a.py", "two"), Step("b.py", "three"), Step("a.py", "four"), Step("b.py", "five")]
    assert counts(steps) == {"functions": 5, "files": 2, "returns": 2}
    assert [line.split() for line in listing(steps[:3]).splitlines()] == [["a.py", "one"], ["two"], ["b.py", "three"]]
    assert counts([]) == {"functions": 0, "files": 0, "returns": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("walk", "first", "last"),
    [("row", "data/files.py", "output.py"), ("fuse", "cli/options.py", "cli/fuse.py"), ("eval", "cli/", "model.py")],
)
def test_walks_of_commands(tmp_path: Path, walk: str, first: str, last: str) -> None:
    command = [sys.executable, "-m", "sku_vllm.benchmarks.walk", walk, "--json", "--place", str(tmp_path)]
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = run([*command, "--without", "evaluate/work.py"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    files = [file for file, _ in found["steps"]]
    assert files[0].startswith(first) and files[-1] == last and "evaluate/work.py" not in files
    assert found["functions"] == len(files) > 20 and found["files"] == len(set(files))
