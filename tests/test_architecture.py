"""docs/architecture.md against the tree: its map, its floors, and the functions it leads a reader through."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
# `name` or `Class.method` in `file`
CITED = sorted(set(re.findall(r"`([A-Za-z_][\w.]*)` in `((?:sku_vllm|cli|kernels)/[\w/]+\.py)`", PAGE)))


def test_the_map_is_the_tree():
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.split("## The map")[1].split("## ")[0], re.M)
    named = {place for row in rows for place in re.findall(r"`([\w./]+)`", row)}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    tracked = [path for path in tracked if (ROOT / path).exists()]
    inside = {"/".join(path.split("/")[:2]) + "/" * (path.count("/") > 1) for path in tracked if path.startswith(("sku_vllm/", "kernels/"))}
    top = {path.split("/")[0] + "/" for path in tracked if "/" in path} - {"sku_vllm/", "kernels/"}
    assert named == (inside - {"sku_vllm/py.typed"}) | {folder for folder in top if not folder.startswith(".")}


def test_the_floors_are_the_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (floors,) = [contract["layers"] for contract in project["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"]
    drawn = PAGE.split("## Which way arrows point")[1].split("```text\n")[1].split("\n```")[0]
    assert drawn.split("\n") == floors


def defined_in(file: str) -> set[str]:
    """The classes, functions and methods of a file, by their qualified names; none where there is no such file."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if (ROOT / file).is_file() else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


@pytest.mark.parametrize(("name", "file"), CITED)
def test_what_the_page_leads_through_is_there(name, file):
    assert name in defined_in(file)


def walked() -> list[tuple[str, str]]:
    """(file, function) of every line of the recorded lists under "Now"."""
    found, file = [], ""
    for block in re.findall(r"^Now:\n\n```text\n(.*?)\n```", PAGE, re.M | re.S):
        for line in block.splitlines():
            *place, function = line.split()
            file = place[0] if place else file
            found.append((file if file.startswith(("cli/", "kernels/")) else f"sku_vllm/{file}", function))
    return found


def test_the_recorded_walks_are_of_functions_that_are_there():
    """A walk that has changed otherwise is found by recording it again: `python -m sku_vllm.benchmarks.walk`."""
    steps = walked()
    assert len(steps) > 100
    gone = {f"{name} in {file}" for file, name in steps if name not in defined_in(file)}
    assert not gone, f"record the walks again: {gone}"


def test_enough_is_led_through():
    assert len(CITED) >= 15
