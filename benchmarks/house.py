"""How a Python project's code is laid out, in numbers: `python -m sku_vllm.benchmarks.house [PATH…]` prints a column a project.

Open it to read or change the limits that `make lint` holds (`--check`); what is counted in a file is in house_files.py.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from sku_vllm.benchmarks.house_files import FunctionSize, SourceFile, read_source
from sku_vllm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# folder of this checkout: the dotted name it is imported by. benchmarks/ is measured when it is named as a PATH.
OURS = {"sku_vllm": "sku_vllm", "cli": "sku_vllm.cli", "kernels/delta_merge": "sku_vllm.kernels.delta_merge"}
LIMITS = {"longest file": 250, "median file": 120, "longest function": 60, "parameters": 8, "documented": 0.9}


@dataclass(frozen=True, slots=True)
class Project:
    """The files of a project and the words of its README (None where it has none)."""

    name: str
    files: tuple[SourceFile, ...]
    readme_words: int | None

    @property
    def functions(self) -> list[FunctionSize]:
        """Every function that is neither a Triton kernel nor a click callback."""
        return [function for file in self.files for function in file.functions]

    def documented(self) -> float:
        """Share of public modules, classes, functions and methods with a docstring, 0 to 1; 1 where nothing is public."""
        without = sum(len(file.undocumented) for file in self.files)
        total = without + sum(len(file.documented) for file in self.files)
        return 1 - without / total if total else 1.0

    def circles(self) -> list[list[str]]:
        """Groups of files that import each other in a circle, each as sorted dotted names."""
        known = {file.module for file in self.files}
        edges = {file.module: sorted(_targets(file, known) - {file.module}) for file in self.files}
        return [sorted(group) for group in strongly_connected(edges) if len(group) > 1]

    def numbers(self) -> dict[str, Any]:
        """What `--json` prints of a project: counts of lines, shares from 0 to 1."""
        lines = [file.lines for file in self.files]
        sizes = sorted(function.lines for function in self.functions)
        return {
            "files": len(lines),
            "file_lines": {"median": median(lines), "longest": max(lines)},
            "functions": len(sizes),
            "function_lines": {"median": median(sizes), "p95": percentile(sizes, 0.95), "longest": sizes[-1]} if sizes else None,
            "most_parameters": max((function.parameters for function in self.functions), default=0),
            "public_docstrings": round(self.documented(), 4),
            "import_circles": len(self.circles()),
            "files_in_circles": sum(map(len, self.circles())),
            "readme_words": self.readme_words,
        }


def read_project(folders: Mapping[Path, str], name: str, readme: Path | None) -> Project:
    """Read the Python files below each folder, whose dotted name is given ("" for a folder that is itself on the import path).

    Raises:
        ConfigError: no Python file below the folders, or one that Python cannot parse.
    """
    files = []
    for folder, prefix in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if any(part.startswith(".") for part in parts):
                continue
            module = ".".join(filter(None, [prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
            try:
                files.append(read_source(path, module))
            except (SyntaxError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: Python cannot parse it ({error}); leave its folder out") from error
    if not files:
        raise ConfigError(f"{', '.join(map(str, folders))}: no Python file; name the folder of a package")
    return Project(name, tuple(files), len(readme.read_text(encoding="utf-8").split()) if readme else None)


def project_at(path: Path) -> Project:
    """A project by the folder of its package, its README beside it or one folder up; or a checkout of this project by its root."""
    path = path.resolve()
    if all((path / folder).is_dir() for folder in OURS):
        name = "this project" if path == ROOT else path.name
        return read_project({path / folder: prefix for folder, prefix in OURS.items()}, name, path / "README.md")
    readme = next((file for folder in (path, *list(path.parents)[:2]) if (file := folder / "README.md").is_file()), None)
    name = readme.parent.name if readme else path.name
    return read_project({path: path.name if (path / "__init__.py").is_file() else ""}, name, readme)


def _targets(file: SourceFile, known: set[str]) -> set[str]:
    """The project's own files that a file imports: a submodule where one is named, else the longest module that is the project's."""
    found = set()
    for module, name in file.imports:
        parts = [*module.split("."), name] if name else module.split(".")
        candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found |= {next((candidate for candidate in candidates if candidate in known), file.module)}
    return found


def strongly_connected(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            groups.append(stack[cut:])
            del stack[cut:]

    for node in edges:
        if node not in index:
            visit(node)
    return groups


def percentile(ordered: Sequence[int], share: float) -> int:
    """Nearest-rank percentile of a sorted list."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def offenders(project: Project) -> Iterator[str]:
    """A line for each thing beyond LIMITS, with its file and line; undocumented names only where their share is too small."""
    here = Path.cwd()

    def where(file: SourceFile) -> str:
        return str(file.path.relative_to(here) if file.path.is_relative_to(here) else file.path)

    for file in project.files:
        if file.lines > LIMITS["longest file"]:
            yield f"{where(file)}: {file.lines} lines, more than {LIMITS['longest file']}"
        for function in file.functions:
            name = f"{where(file)}:{function.line}: {function.name}"
            if function.lines > LIMITS["longest function"]:
                yield f"{name} has {function.lines} lines, more than {LIMITS['longest function']}"
            if function.parameters > LIMITS["parameters"]:
                yield f"{name} has {function.parameters} parameters, more than {LIMITS['parameters']}"
    middle = median(file.lines for file in project.files)
    if middle > LIMITS["median file"]:
        yield f"the median file has {middle:g} lines, more than {LIMITS['median file']}"
    if project.documented() < LIMITS["documented"]:
        for file in project.files:
            yield from (f"{where(file)}:{line}: {name} has no docstring" for name, line in file.undocumented)
        yield f"{project.documented():.1%} of public names have a docstring, less than {LIMITS['documented']:.0%}"
    for circle in project.circles():
        yield f"these files import each other in a circle: {', '.join(circle)}"


def markdown(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a column for each project, from its `Project.numbers`."""
    columns = [_cells(found) for found in numbers.values()]
    lines = ["| | " + " | ".join(numbers) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {heading} | {' | '.join(column[heading] for column in columns)} |" for heading in columns[0]]
    return "\n".join(lines)


def _cells(found: Mapping[str, Any]) -> dict[str, str]:
    """Heading of a row: what stands in it."""
    file, function, words = found["file_lines"], found["function_lines"], found["readme_words"]
    sizes = f"{function['median']:g} / {function['p95']} / {function['longest']}" if function else "none"
    return {
        "files": str(found["files"]),
        "lines of a file: median / longest": f"{file['median']:g} / {file['longest']}",
        "lines of a function: median / 95th percentile / longest": sizes,
        "most parameters of a function": str(found["most_parameters"]),
        "public names with a docstring": f"{found['public_docstrings']:.0%}",
        "import circles (files in them)": f"{found['import_circles']} ({found['files_in_circles']})",
        "words of the README": "none" if words is None else str(words),
    }


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--check", is_flag=True, help="Name everything beyond the limits of this project, and exit 1 where there is any.")
def command(paths: tuple[Path, ...], as_json: bool, check: bool) -> None:
    """Measure the Python code below each PATH: the folder of a package, or the root of a checkout of this project (the default).

    Of this project the package, its commands and its kernels count. Triton kernels and click callbacks are left out of the counts
    of lines and parameters.
    """
    projects = [project_at(path) for path in paths or [ROOT]]
    if check:
        found = [line for project in projects for line in offenders(project)]
        click.echo("\n".join(found) if found else "within the limits")
        sys.exit(bool(found))
    numbers = {project.name: project.numbers() for project in projects}
    click.echo(json.dumps(numbers, indent=2) if as_json else markdown(numbers))


if __name__ == "__main__":
    command()
