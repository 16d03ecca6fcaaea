"""The methods benchmark: one real cell through the command, kept, drawn and tabulated."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.mark.slow
def test_one_cell_and_its_table(tmp_path: Path, run_sku: Callable) -> None:
    arguments = ("bench", "methods", "--work", tmp_path / "work", "--world", 0, "--models", "llama", "--seeds", 0, "--samples", 1, "--json")
    done = run_sku(*arguments, "--methods", "task-vector", "--output", tmp_path / "table.md", timeout=1700)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["base"]["forget"]["unseen"]["greedy"]["harmful"] >= 0.5
    assert cell["test"]["forget"]["unseen"]["greedy"]["harmful"] <= cell["base"]["forget"]["unseen"]["greedy"]["harmful"] / 2
    assert [point["scale"] for point in cell["curve"]] == [0.25, 0.5, 0.75, 0.9, 1.0, 1.25]
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert "| task-vector | 1 |" in text and len(columns) == 1
    drawing = ElementTree.parse(tmp_path / "table-llama.svg")
    assert len(drawing.findall(".//{*}circle")) == 6
    again = run_sku(*arguments, "--methods", "task-vector", timeout=600)  # nothing is trained twice
    assert json.loads(again.stdout)["cells"] == [cell]


def test_unknown_method(tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("bench", "methods", "--work", tmp_path / "work", "--methods", "task-vectr")
    assert done.returncode == 2 and "task-vector" in done.stderr and not (tmp_path / "work").exists()
