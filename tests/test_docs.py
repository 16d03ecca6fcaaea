"""The pages: commands marked `<!-- run -->` are executed as written, page by page, in an empty directory; links, flags and paths exist."""

import ast
import io
import os
import re
import socket
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- run(?P<kind> server)? -->\n```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.S | re.M)
FOLDERS = ("sku_vllm", "cli", "kernels", "benchmarks", "tests", "docs", "deploy")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)
# Where the README and docs send a user to type something. Results and research keep commands as they were.
COMMAND_PAGES = [page for page in PAGES if not page.startswith(("benchmarks/", "docs/research/"))]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")) + ["conftest.py"]

PATH = re.compile(rf"(?<![\w/.\-@])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]")
NAME = re.compile(r"(?<![\w/.\-*{}])[a-zA-Z][\w-]*\.(?:md|py)\b")
# Files that users write, or that other projects have: vLLM's LoRA kernels for CPUs, and the published training loop.
ELSEWHERE = {"safer-card.md", "FILE.md", "punica_cpu.py", "unlearn_harm_new.py"}
# Pages of the project's own planning, which are not in the repository: docs/contracts.md and docs/architecture.md are.
OUTSIDE = re.compile(r"\b(?:CONTRACTS|DESIGN|MOVES|STYLE|UNLEARNING)\b(?:\.md)?")


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer(read(page)))


def run(commands: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Like a terminal: one bash for the whole page; children that are still there at the end are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "PORT": str(port), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n" + commands
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def prose(source: str) -> str:
    """Comments and docstrings of a Python file."""
    text = read(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, holders)]
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT]
    return "\n".join([*docstrings, *comments])


def lost_paths(text: str) -> list[str]:
    """Paths below the repository's folders that are not there."""
    return [path for path in PATH.findall(text) if not (ROOT / path.rstrip("/")).exists()]


def lost_names(text: str) -> list[str]:
    """Bare names of .md and .py files that no folder has."""
    known = {Path(path).name for path in (*PAGES, *SOURCES)} | ELSEWHERE
    return [name for name in NAME.findall(PATH.sub("", text)) if name not in known]


def anchors(page: str) -> set[str]:
    """What a forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(read("README.md").split()) <= 700


def test_there_are_commands_to_run() -> None:
    assert {page for page in PAGES if blocks(page)} >= {f"docs/{name}.md" for name in ("tutorial", "operations", "benchmarks")}
    # A mark that no longer precedes a block would silently drop it.
    for page in PAGES:
        assert len(re.findall(r"^<!-- run", read(page), re.M)) == len(blocks(page)), page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", read(page)):
        place = (ROOT / page).parent / target if target else ROOT / page
        assert place.resolve().exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(place.resolve().relative_to(ROOT).as_posix()), f"{page}: {target}#{anchor}"


def test_cited_files_exist() -> None:
    """In every page and Python file; names without a folder in pages, comments and docstrings."""
    # Links are another test's, and lists headed "Before:" name files as they were called once.
    pages = {page: re.sub(r"\]\([^)]*\)|^Before:\n\n```.*?^```$", "]", read(page), flags=re.M | re.S) for page in PAGES}
    lost = [f"{page}: {path}" for page, text in pages.items() for path in [*lost_paths(text), *lost_names(text)]]
    lost += [f"{source}: {path}" for source in SOURCES for path in [*lost_paths(read(source)), *lost_names(prose(source))]]
    assert not lost, "\n".join(lost)


def test_nothing_cites_plans_that_are_not_here() -> None:
    cited = [f"{source}: {name}" for source in SOURCES for name in OUTSIDE.findall(prose(source))]
    cited += [f"{page}: {name}" for page in PAGES for name in OUTSIDE.findall(read(page))]
    assert not cited, "\n".join(cited)


def test_every_flag_in_the_docs_exists() -> None:
    """Blocks that are not run (GPU, cron, services) name only commands and flags that the command line has."""
    from sku_vllm.cli import COMMANDS, sku

    for page in COMMAND_PAGES:
        text = read(page).replace("\\\n", " ")
        shown = [*re.findall(r"```bash\n(.*?)```", text, re.S), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
        for command, rest in re.findall(r"\bsku (\w[\w-]*)([^\n|;&()]*)", "\n".join(shown)):
            assert command in COMMANDS, f"{page}: sku {command}"
            if command in ("serve", "bench"):  # other flags are vLLM's or the benchmark's
                continue
            known = {option for parameter in sku.get_command(None, command).params for option in parameter.opts}
            unknown = [flag for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if flag not in known]
            assert not unknown, f"{page}: sku {command} has no {unknown}"


@pytest.mark.parametrize("page", ["operations", pytest.param("benchmarks", marks=pytest.mark.slow)])
def test_short_pages(page: str, tmp_path: Path) -> None:
    done = run("\n".join(block["code"] for block in blocks(f"docs/{page}.md")), tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_tutorial(tmp_path: Path) -> None:
    """A stranger's way from two files to a report and a running A/B server."""
    done = run("\n".join(block["code"] for block in blocks("docs/tutorial.md")), tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Verified: what was judged is what is served" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "safer-card.md").read_text(encoding="utf-8").startswith("---\nbase_model")
    assert (tmp_path / "watch.db").stat().st_size > 0 and '"model"' in done.stdout
