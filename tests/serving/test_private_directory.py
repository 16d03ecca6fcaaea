"""Private directories: what a killed server left is reclaimed; nothing else is."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sku_vllm.serving.private_directory import private_directory, reclaim

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import eventually  # noqa: E402


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder(place, inherit=False):
    """A process that holds a private directory, and its path; with `inherit`, so does a child that outlives it."""
    script = (
        "import subprocess, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from sku_vllm.serving.private_directory import private_directory\n"
        "path, lock = private_directory(); (path / 'adapter').write_text('x')\n"
        "child = subprocess.Popen(['sleep', '3600'], pass_fds=[lock], stdout=subprocess.DEVNULL) if sys.argv[2] == 'True' else None\n"
        "print(path, child.pid if child else 0, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(place), str(inherit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path, child = process.stdout.readline().split()
    return process, place / os.path.basename(path), int(child)


def test_a_killed_servers_directory_goes_at_the_next_start_and_a_living_ones_stays(place):
    process, path, _ = holder(place)
    assert path.stat().st_mode & 0o777 == 0o700
    assert reclaim() == [] and path.is_dir()
    process.kill()
    process.wait()
    mine, lock = private_directory()
    assert not path.exists() and mine.is_dir()
    os.close(lock)


def test_a_start_at_the_same_moment_takes_nothing(place, monkeypatch):
    """Another server looks for what dead ones have left, in the very moment in which this one has its lock file and no lock yet."""
    lock_it = fcntl.flock

    def slowly(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock_it)
        assert reclaim() == []
        lock_it(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slowly)
    path, lock = private_directory()
    assert path.is_dir() and reclaim() == []
    os.close(lock)
    assert reclaim() == [path]


def test_a_directory_that_a_child_still_uses_stays(place):
    process, path, child = holder(place, inherit=True)
    process.kill()
    process.wait()
    assert reclaim() == [] and (path / "adapter").exists()
    os.kill(child, signal.SIGKILL)
    assert eventually(lambda: reclaim() == [path])
    assert not path.exists()


def test_vllms_sockets_and_rendezvous_go_with_the_directory(place, monkeypatch):
    from types import SimpleNamespace

    from vllm.utils import network_utils

    from sku_vllm.serving.private_directory import LONGEST, SOCKETS, hold_rendezvous, hold_sockets

    for name in ("vllm.utils.network_utils", "vllm.v1.executor.uniproc_executor"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_file_store_init_method=network_utils.get_file_store_init_method))
    monkeypatch.delitem(sys.modules, "vllm.v1.executor.multiproc_executor", raising=False)
    asked = sys.modules["vllm.v1.executor.uniproc_executor"]
    for kept, run in ((None, place / ("x" * LONGEST)), ("/somewhere", place)):  # too long for a socket; the operator's own
        monkeypatch.delenv(SOCKETS, raising=False)
        if kept:
            monkeypatch.setenv(SOCKETS, kept)
        hold_sockets(run)
        hold_rendezvous()
        assert os.environ.get(SOCKETS) == kept and "/sku-serve-" not in asked.get_file_store_init_method()
    monkeypatch.delenv(SOCKETS)
    run = Path("/tmp/sku-serve-abcdefgh")
    hold_sockets(run)
    hold_rendezvous()
    assert network_utils.get_open_zmq_ipc_path().startswith(f"ipc://{run}/")
    assert asked.get_file_store_init_method().startswith(f"file://{run}/vllm_dist_")
    monkeypatch.delenv(SOCKETS)


def test_the_counts_of_several_api_servers_go_with_the_directory(place, monkeypatch):
    from types import SimpleNamespace

    from sku_vllm.serving.private_directory import COUNTERS, COUNTS, hold_counts

    def vllms():
        raise AssertionError("vLLM's own, which leaves a directory behind that has no name")

    modules = [SimpleNamespace(setup_multiprocess_prometheus=vllms) for _ in COUNTERS]
    for name, module in zip(COUNTERS, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(COUNTS, "/the/operators/own")
    hold_counts(place)
    assert all(module.setup_multiprocess_prometheus is vllms for module in modules)
    monkeypatch.delenv(COUNTS)
    hold_counts(place)
    for module in modules:
        module.setup_multiprocess_prometheus()
    assert os.environ[COUNTS] == str(place / "counts") and (place / "counts").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(COUNTS)


def test_vllm_has_what_holds_the_counts():
    """Where a release names it otherwise, it makes a directory of its own again."""
    import importlib

    from sku_vllm.serving.private_directory import COUNTERS, COUNTING

    assert all(callable(getattr(importlib.import_module(name), COUNTING)) for name in COUNTERS)


def test_what_is_not_a_private_directory_of_ours_stays(place):
    outside = place / "outside"
    outside.mkdir(mode=0o700)
    (outside / "lock").touch()
    (place / "sku-serve-link").symlink_to(outside)
    for name, mode in (("open", 0o755), ("young", 0o700)):
        (place / f"sku-serve-{name}").mkdir(mode=mode)
    (place / "sku-serve-open/lock").touch()
    (place / "sku-serve-lock").mkdir(mode=0o700)
    (place / "sku-serve-lock/lock").symlink_to(outside / "lock")
    (place / "sku-serve-file").touch()
    assert reclaim() == []
    assert {path.name for path in place.iterdir()} == {
        "outside",
        *(f"sku-serve-{name}" for name in ("link", "open", "young", "lock", "file")),
    }
