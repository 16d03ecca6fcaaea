"""Where a compiled function is kept, what is said about it, and that nothing wrong with that place is a reason to fail."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from numba import types

from sku_vllm.kernels.delta_merge.compiled import compiled


@pytest.fixture
def compile_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Compiles a function of `tmp_path` as a new process would, and returns what was said."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "twice_module.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "twice_module", raising=False)
    module = importlib.import_module("twice_module")

    def run() -> list[str]:
        caplog.clear()
        function = compiled(module.twice, [types.int64(types.int64), types.float64(types.float64)])
        assert function(21) == 42 and function(0.5) == 1.0
        return [record.getMessage() for record in caplog.records]

    return run


def test_it_is_compiled_once_and_kept_beside_its_source(compile_said, tmp_path):
    first, last = compile_said()
    assert first.startswith("compiling") and last.endswith(f"kept in {tmp_path / '__pycache__'}")
    assert compile_said() == []


def test_where_the_source_cannot_be_written_to_the_users_cache_keeps_it(compile_said, tmp_path):
    (tmp_path / "__pycache__").touch()  # root may write to a read-only directory, but to none that is a file
    assert f"kept in {tmp_path / 'home/numba'}" in compile_said()[-1]
    assert compile_said() == [] and (tmp_path / "__pycache__").stat().st_size == 0


def test_with_no_place_at_all_it_is_compiled_and_says_what_to_do(compile_said, tmp_path):
    (tmp_path / "__pycache__").touch()
    (tmp_path / "home").touch()
    for _ in range(2):
        assert [line.split()[0] for line in compile_said()] == ["compiling", "the"] and "NUMBA_CACHE_DIR" in compile_said()[-1]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [b"", b"\x80\x05garbage"])
def test_damaged_files_are_made_anew(compile_said, tmp_path, kind, left):
    """What a power cut leaves of files that were renamed into place and not yet on the disk."""
    compile_said()
    for file in (tmp_path / "__pycache__").glob(f"*.{kind}"):
        file.write_bytes(left)
    assert "not kept" in compile_said()[-1]
    assert "kept in" in compile_said()[-1] and compile_said() == []


def test_a_full_disk_keeps_nothing_half_written(compile_said, tmp_path):
    folder = tmp_path / "__pycache__"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        assert "No space left" in compile_said()[-1]
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)
