"""What may be imported from `sku_vllm`, and the pages that show it: docs/python.md and docs/extending.md are executed as written."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import sku_vllm

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- (?P<mark>executed(?: server)?|file (?P<path>\S+)) -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.S | re.M)
HEAVY = ("torch", "transformers", "vllm", "peft", "click", "yaml", "numpy")


def blocks(page: str) -> list[re.Match[str]]:
    """The marked blocks of a page; a mark without a block would drop one silently."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert found and len(found) == len(re.findall(r"^<!-- (?:executed|file)", text, re.M)), page
    return found


def python(code: str, folder: Path, *, timeout: float = 900, path: Path | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light():
    loaded = python("import sku_vllm, sys; dir(sku_vllm); print(*sys.modules)", ROOT / "docs").split()
    assert not set(HEAVY) & set(loaded)
    assert {name for name in loaded if name.startswith("sku_vllm")} == {"sku_vllm", "sku_vllm.version"}


def test_requests_and_data_come_without_torch():
    code = "import sys; from sku_vllm import EvalConfig, EvalRequest, Limits, ModelSpec, TrainConfig, load_dataset; print(*sys.modules)"
    assert not {"vllm", "peft"} & set(python(code, ROOT / "docs").split())


@pytest.mark.parametrize("name", sku_vllm.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(sku_vllm, name)
    assert name in dir(sku_vllm) and value is getattr(sku_vllm, name)
    if name != "__version__":
        assert value.__name__ == name and value.__doc__
        assert f"`{name}`" in (ROOT / "docs/python.md").read_text(encoding="utf-8"), f"docs/python.md does not mention {name}"


def test_no_verb_has_the_name_of_a_folder():
    """`sku_vllm.fuse` is a folder; a function of that name would hide it, or be hidden, depending on what was imported first."""
    inside = {path.stem for path in (ROOT / "sku_vllm").iterdir()} | {"cli", "benchmarks"}
    assert not set(sku_vllm.__all__) & inside


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'fuse_everything'"):
        sku_vllm.fuse_everything  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "sku_vllm/__init__.py").read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name: str(node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names.keys() == sku_vllm._HOMES.keys() == set(sku_vllm.__all__) - {"__version__"}
    assert all(module.startswith(f"sku_vllm.{sku_vllm._HOMES[name]}") for name, module in names.items())


def test_nothing_inside_imports_the_root():
    """The root may look into every room because no room looks at the root."""
    for place in ("sku_vllm", "cli", "kernels"):
        for file in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                taken = node.module == "sku_vllm" and {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
                assert not (taken or set()) & set(sku_vllm.__all__), f"{file.relative_to(ROOT)}: import it from the module that defines it"


def test_types_and_version_are_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (ROOT / "sku_vllm/py.typed").is_file() and "py.typed" in project["tool"]["setuptools"]["package-data"]["sku_vllm"]
    assert version("sku-vllm") == sku_vllm.__version__


def test_python_page(tmp_path):
    python("\n".join(block["code"] for block in blocks("python.md") if block["mark"] == "executed"), tmp_path)


@pytest.mark.slow
def test_python_page_with_its_server(tmp_path):
    """The whole page in one process, as a reader would follow it."""
    python("if __name__ == '__main__':\n" + _indented("\n".join(block["code"] for block in blocks("python.md"))), tmp_path, timeout=1500)


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    """The package of docs/extending.md, installed by pip into a folder of its own; returns (that folder, an empty directory)."""
    source, site, work = (tmp_path_factory.mktemp(name) for name in ("source", "site", "work"))
    for block in blocks("extending.md"):
        if block["path"]:
            (source / block["path"]).parent.mkdir(exist_ok=True)
            (source / block["path"]).write_text(block["code"], encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site, source]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stderr
    return site, work


def test_extending_page(gentle):
    """`sku train --method`, `sku judge` and `sku attack` take what the package brings."""
    site, work = gentle
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    for block in blocks("extending.md"):
        if block["language"] == "bash":
            command = ["bash", "-c", "set -euo pipefail\n" + block["code"]]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
        elif block["mark"] == "executed":
            python(block["code"], work, path=site)
    labels = [json.loads(line)["label"] for line in (work / "verdicts.jsonl").read_text().splitlines()]
    assert labels == ["harmful", "refusal"]
    assert json.loads((work / "attacked/sku_attack.json").read_text())["attacks"]["shout"][0]["attack"] == "upper case"
    assert json.loads((work / "adapter/sku_train.json").read_text())["method"] == "gentle"
