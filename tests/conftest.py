"""Fixtures that cost seconds and are shared by the whole session: the lab, and a runner of the real `sku` command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and data beside the checkout; tests that read it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in lab, written once: llama/, opt/, forget/, retain/, lexicon.json. Read only."""
    from sku_vllm.lab import make_lab

    return make_lab(tmp_path_factory.mktemp("lab") / "lab")


@pytest.fixture(scope="session")
def run_sku() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command in a process of its own: `run_sku("eval", "--json", …)`, with `.returncode`, `.stdout`, `.stderr`."""

    def run(*arguments: object, timeout: float = 600, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sku_vllm.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})

    return run
