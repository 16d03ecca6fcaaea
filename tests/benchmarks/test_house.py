"""What house.py counts, on small made-up trees."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sku_vllm.benchmarks import house
from sku_vllm.benchmarks.house_files import SourceFile, read_source
from sku_vllm.errors import ConfigError


def write(folder: Path, **files: str) -> Path:
    """A package `pack` of the given modules."""
    package = folder / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return package


def source(tmp_path: Path, text: str, module: str = "pack.one") -> SourceFile:
    (tmp_path / "one.py").write_text(text)
    return read_source(tmp_path / "one.py", module)


def test_parameters_and_lines(tmp_path: Path) -> None:
    text = """
class Box:
    def method(self, a, /, b, *rest, c=1, **more):
        def inner(x):
            return x
        return inner

    @staticmethod
    def alone(a, b): ...

    @classmethod
    def made(cls, a): ...


@wrapped
def free(self_is_counted, b):
    return 1
"""
    found = {function.name: (function.parameters, function.lines) for function in source(tmp_path, text).functions}
    assert found == {"method": (5, 4), "inner": (1, 2), "alone": (2, 1), "made": (1, 1), "free": (2, 2)}


def test_kernels_and_click_callbacks_are_exempt(tmp_path: Path) -> None:
    text = """
@triton.autotune([])
@triton.jit
def kernel(a, b): ...

@click.command()
def one(a): ...

@sku_command("train")
def two(a): ...

@app.group
def three(a): ...

@click.option("--command")
@numba.njit
def counted(a): ...
"""
    assert [function.name for function in source(tmp_path, text).functions] == ["counted"]


def test_public_docstrings(tmp_path: Path) -> None:
    text = '''
class Public:
    """Said."""

    def __init__(self): ...

    def _private(self): ...

    def silent(self): ...

    @property
    def value(self):
        """Said."""

    @value.setter
    def value(self, new): ...


class _Private:
    def silent(self): ...


def function():
    """Said."""
    def nested(): ...
'''
    found = source(tmp_path, text)
    assert found.documented == (("Public", 2), ("Public.value", 12), ("function", 23))
    assert found.undocumented == (("module", 1), ("Public.silent", 9))
    assert source(tmp_path, "").undocumented == ()


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    text = """
import a.b
if TYPE_CHECKING:
    from .two import Two
def later():
    from ..other import name
"""
    found = source(tmp_path, text, "root.pack.one").imports
    assert found == {("a.b", ""), ("root.pack.two", "Two"), ("root.other", "name")}


def test_circles(tmp_path: Path) -> None:
    package = write(
        tmp_path,
        one="from pack import two",
        two="def late():\n    from pack.three import x",
        three="if TYPE_CHECKING:\n    from .one import X",
        four="from pack import one\nimport pack.five.name",
        five="import os",
    )
    project = house.project_at(package)
    assert project.circles() == [["pack.one", "pack.three", "pack.two"]]
    assert project.numbers()["import_circles"] == 1 and project.numbers()["files_in_circles"] == 3


def test_a_package_that_looks_names_up_lazily_is_no_circle(tmp_path: Path) -> None:
    lazy = "if TYPE_CHECKING:\n    from pack.one import X\n\ndef __getattr__(name):\n    from pack import one\n    return one\n"
    package = write(tmp_path, one="from pack import VERSION")
    (package / "__init__.py").write_text(lazy)
    assert house.project_at(package).circles() == []
    (package / "__init__.py").write_text(lazy + "\ndef other():\n    from pack import one\n")
    assert house.project_at(package).circles() == [["pack", "pack.one"]]


def test_numbers_and_table(tmp_path: Path) -> None:
    package = write(tmp_path, one='"""Said."""\n\n\ndef f(a, b):\n    return a\n', two="x = 1\n")
    (tmp_path / "README.md").write_text("# A title\n\nfour words")
    printed = CliRunner().invoke(house.command, [str(package), "--json"]).stdout
    assert json.loads(printed) == {
        tmp_path.name: {
            "files": 3,
            "file_lines": {"median": 1, "longest": 5},
            "functions": 1,
            "function_lines": {"median": 2, "p95": 2, "longest": 2},
            "most_parameters": 2,
            "public_docstrings": 0.3333,
            "import_circles": 0,
            "files_in_circles": 0,
            "readme_words": 5,
        }
    }
    table = CliRunner().invoke(house.command, [str(package)]).stdout.splitlines()
    assert table[:2] == [f"| | {tmp_path.name} |", "|---|---:|"]
    assert "| lines of a function: median / 95th percentile / longest | 2 / 2 / 2 |" in table


def test_a_project_of_no_functions_and_no_readme(tmp_path: Path) -> None:
    (tmp_path / "a/b/c/src").mkdir(parents=True)
    (tmp_path / "a/b/c/src/one.py").write_text("import two")
    (tmp_path / "a/b/c/src/two.py").write_text("import one")
    project = house.project_at(tmp_path / "a/b/c/src")  # no __init__.py: the folder is on the import path
    assert project.name == "src" and project.readme_words is None and project.circles() == [["one", "two"]]
    assert "| words of the README | none |" in house.markdown({"src": project.numbers()})


def test_check_names_each_offender(tmp_path: Path) -> None:
    long = "def long():\n" + "    x = 1\n" * 60
    package = write(
        tmp_path,
        one=long,
        two="def wide(a, b, c, d, e, f, g, h, i): ...\n",
        three="import pack.four\n" + "\n" * 250,
        four="import pack.three\n",
    )
    found = CliRunner().invoke(house.command, ["--check", str(package)])
    assert found.exit_code == 1
    told = found.stdout.replace(f"{package}/", "").splitlines()
    assert told == [
        "one.py:1: long has 61 lines, more than 60",
        "three.py: 251 lines, more than 250",
        "two.py:1: wide has 9 parameters, more than 8",
        "four.py:1: module has no docstring",
        "one.py:1: module has no docstring",
        "one.py:1: long has no docstring",
        "three.py:1: module has no docstring",
        "two.py:1: module has no docstring",
        "two.py:1: wide has no docstring",
        "0.0% of public names have a docstring, less than 90%",
        "these files import each other in a circle: pack.four, pack.three",
    ]


def test_within_the_limits(tmp_path: Path) -> None:
    found = CliRunner().invoke(house.command, ["--check", str(write(tmp_path, one='"""Said."""\n'))])
    assert (found.exit_code, found.stdout) == (0, "within the limits\n")


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Python file"):
        house.project_at(tmp_path)
    with pytest.raises(ConfigError, match="one.py: Python cannot parse it .*leave its folder out"):
        house.project_at(write(tmp_path, one="def ("))


def test_this_project_is_measured_without_a_path() -> None:
    table = CliRunner().invoke(house.command, []).stdout
    assert table.startswith("| | this project |") and "| import circles" in table
    files = {file.module for file in house.project_at(house.ROOT).files}
    assert {"sku_vllm.cli.train", "sku_vllm.errors", "sku_vllm.kernels.delta_merge.reference"} <= files
    assert not any(name.startswith("sku_vllm.benchmarks") for name in files)
