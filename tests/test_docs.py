"""Every command in docs/ that is marked `<!-- run -->` is executed as written, page by page, in an empty directory."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"<!-- run(?P<kind> server)? -->\n```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.S | re.M)
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def blocks(page: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")))


def run(commands: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Like a terminal: one bash for the whole page; children that are still there at the end are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "PORT": str(port), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n" + commands
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def test_there_are_commands_to_run() -> None:
    assert {page for page in PAGES if blocks(page)} >= {"tutorial.md", "operations.md", "benchmarks.md", "extending.md"}
    # A mark that no longer precedes a block would silently drop it.
    for page in PAGES:
        assert len(re.findall(r"^<!-- run", (DOCS / page).read_text(encoding="utf-8"), re.M)) == len(blocks(page)), page


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text(encoding="utf-8")):
            assert (DOCS / target).resolve().exists(), f"{page}: {target}"


def test_every_flag_in_the_docs_exists() -> None:
    """Blocks that are not run (GPU, cron, services) name only commands and flags that the command line has."""
    from sku_vllm.cli import COMMANDS, sku

    for page in [*PAGES, "../README.md"]:
        text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
        shown = [*re.findall(r"```bash\n(.*?)```", text, re.S), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
        for command, rest in re.findall(r"\bsku (\w[\w-]*)([^\n|;&()]*)", "\n".join(shown)):
            assert command in COMMANDS, f"{page}: sku {command}"
            if command in ("serve", "bench"):  # other flags are vLLM's or the benchmark's
                continue
            known = {option for parameter in sku.get_command(None, command).params for option in parameter.opts}
            unknown = [flag for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if flag not in known]
            assert not unknown, f"{page}: sku {command} has no {unknown}"


@pytest.mark.parametrize("page", ["operations.md", pytest.param("benchmarks.md", marks=pytest.mark.slow)])
def test_short_pages(page: str, tmp_path: Path) -> None:
    done = run("\n".join(block["code"] for block in blocks(page)), tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_extending(tmp_path: Path) -> None:
    code = "\n".join(block["code"] for block in blocks("extending.md"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_tutorial(tmp_path: Path) -> None:
    """A stranger's way from two files to a report and a running A/B server."""
    done = run("\n".join(block["code"] for block in blocks("tutorial.md")), tmp_path, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Verified: what was judged is what is served" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "safer-card.md").read_text(encoding="utf-8").startswith("---\nbase_model")
    assert (tmp_path / "watch.db").stat().st_size > 0 and '"model"' in done.stdout
