"""Where a compiled function is kept, what is said about it, and that nothing wrong with that place is a reason to fail."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sku_vllm.kernels.delta_merge.compiled import compiled

TWICE = """
define i64 @twice(i64 %x) {
  %y = call i64 @helper(i64 %x)
  ret i64 %y
}
define i64 @helper(i64 %x) {
  %y = add i64 %x, %x
  ret i64 %y
}
define void @wrapper() {
  call void @of_a_library_that_is_not_here()
  ret void
}
declare void @of_a_library_that_is_not_here()
"""
THRICE = "define i64 @thrice(i64 %x) {\n  %y = mul i64 %x, 3\n  ret i64 %y\n}\n"


@pytest.fixture
def compile_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Compiles functions of a file in `tmp_path` as a new process would, and returns what was said."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "twice.py").write_text("first")

    def run() -> list[str]:
        caplog.clear()
        addresses = compiled(tmp_path / "twice.py", lambda: [("twice", TWICE), ("thrice", THRICE)], ("twice", "thrice"))
        twice, thrice = (ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address) for address in addresses)
        assert twice(21) == 42 and thrice(-5) == -15
        return [record.getMessage() for record in caplog.records]

    return run


def test_it_is_compiled_once_and_kept_beside_its_source(compile_said, tmp_path):
    first, last = compile_said()
    assert first.startswith("compiling") and last.endswith(f"kept in {tmp_path / '__pycache__'}")
    assert compile_said() == []


def test_where_the_source_cannot_be_written_to_the_users_cache_keeps_it(compile_said, tmp_path):
    (tmp_path / "__pycache__").touch()  # root may write to a read-only directory, but to none that is a file
    assert f"kept in {tmp_path / 'home/sku_vllm'}" in compile_said()[-1]
    assert compile_said() == [] and (tmp_path / "__pycache__").stat().st_size == 0


def test_with_no_place_at_all_it_is_compiled_and_says_what_to_do(compile_said, tmp_path):
    (tmp_path / "__pycache__").touch()
    (tmp_path / "home").touch()
    for _ in range(2):
        assert [line.split()[0] for line in compile_said()] == ["compiling", "the"] and "NUMBA_CACHE_DIR" in compile_said()[-1]


@pytest.mark.parametrize("left", [b"", b"\x80\x05garbage", None])
def test_damaged_files_are_made_anew(compile_said, tmp_path, left):
    """What a power cut leaves of files that were renamed into place and not yet on the disk; None: a file that lacks its end."""
    compile_said()
    (file,) = (tmp_path / "__pycache__").glob("*.o")
    file.write_bytes(file.read_bytes()[:-3] if left is None else left)
    assert "kept in" in compile_said()[-1] and compile_said() == []


def test_another_source_is_compiled_anew(compile_said, tmp_path):
    compile_said()
    (tmp_path / "twice.py").write_text("second")
    assert "kept in" in compile_said()[-1] and len(list((tmp_path / "__pycache__").iterdir())) == 2


def test_a_full_disk_keeps_nothing_half_written(compile_said, tmp_path):
    folder = tmp_path / "__pycache__"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        (folder / "other").write_bytes(bytes(4096))
        said = compile_said()[-1]
        assert "kept in" in said and str(folder) not in said  # in the user's cache directory instead
        assert os.listdir(folder) == ["other"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
