"""Directories appear complete or not at all, whatever happens in the middle."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.output import output_directory, partial_path, record, write_json


def test_output_appears_by_rename_and_complete(tmp_path):
    with output_directory(tmp_path / "a" / "b", mode=0o700) as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert not partial_path(tmp_path / "a" / "b").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_after_an_error(tmp_path, error):
    with pytest.raises(error), output_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_resumable_work_is_kept_and_found_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out", keep=True) as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    with output_directory(tmp_path / "out", resume=True) as folder:
        assert (folder / "x").read_text() == "1"
    assert (tmp_path / "out" / "x").exists()


def test_stale_partial_of_a_killed_run_is_replaced(tmp_path):
    code = (
        "import sys, time\nfrom sku_vllm.output import output_directory\n"
        f"with output_directory({str(tmp_path / 'out')!r}) as folder:\n"
        " (folder / 'stale').write_text('1'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and partial_path(tmp_path / "out").exists()
    with output_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_two_writers_of_one_output(tmp_path):
    with output_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        with pytest.raises(ConfigError, match="another command is writing there"), output_directory(tmp_path / "out"):
            pass
        assert (folder / "x").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("empty", tmp_path / "disk"), ("dangling", tmp_path / "later")):
        (tmp_path / name).symlink_to(target)
        with output_directory(tmp_path / name) as folder:
            (folder / "x").write_text("1")
        assert (tmp_path / name).is_symlink() and (target / "x").exists()


def test_what_is_in_the_way_is_said_before_any_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("keep me")
    (tmp_path / "file").write_text("")
    for name, words in {"full": "not empty", "file": "is a file", "file/below": "not a writable directory"}.items():
        with pytest.raises(ConfigError, match=words), output_directory(tmp_path / name):
            pytest.fail("entered")
    assert (tmp_path / "full" / "x").read_text() == "keep me"


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    with output_directory(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "empty" / "x").exists()


def test_json_is_atomic_strict_and_recorded(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1}, mode=0o600)
    with pytest.raises(SkuError, match="NaN"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    record(tmp_path, "eval", {"n": 1}, {"seed": 0})
    document = json.loads((tmp_path / "sku_eval.json").read_text())
    assert document["schema"] == "sku.eval/1" and document["n"] == 1 and document["config"] == {"seed": 0}
    assert document["versions"]["torch"].startswith("2.")
