"""Temporary directories of servers (mode 0700). The processes that use one lock it; a later start removes it once they are all dead.

Open this file if a server leaves something behind in the temporary directory.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
from pathlib import Path

from sku_vllm.client.socket_path import SOCKET_PATH

PREFIX = "sku-serve-"
LOCK = "lock"
SOCKETS = "VLLM_RPC_BASE_PATH"  # vLLM's variable for the directory of its sockets
LONGEST = SOCKET_PATH - 37  # bytes of that directory's path: the socket's name is a "/" and a UUID
ASKED = "get_file_store_init_method"
COUNTS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's variable for the files in which several processes count
COUNTING = "setup_multiprocess_prometheus"
COUNTERS = ("vllm.v1.metrics.prometheus", "vllm.entrypoints.cli.serve")  # vLLM's modules that make that directory
MEETING = (  # vLLM's modules that ask for the rendezvous file, in the order in which they may have been imported
    "vllm.utils.network_utils",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
)


def private_directory() -> tuple[Path, int]:
    """A new directory (mode 0700) and the file descriptor that holds its lock; a child that inherits the descriptor keeps the lock.

    Directories of servers that were killed are removed first, with the adapters in them.
    """
    reclaim()
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    # Locked before it gets its name: a start at the same moment would take a lock that nobody holds yet for a dead server's.
    lock = os.open(path / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(path / f"{LOCK}.new", path / LOCK)
    return path, lock


def hold_sockets(run: Path) -> None:
    """Let vLLM, in this process and its children, put its sockets into `run`, so that they go with it.

    vLLM leaves them in the temporary directory where it is killed, and some of them always. Nothing happens where `run` is so long that a
    socket's path would not fit, or where VLLM_RPC_BASE_PATH says where sockets shall be.
    """
    if SOCKETS not in os.environ and len(os.fsencode(run)) <= LONGEST:
        os.environ[SOCKETS] = str(run)


def hold_rendezvous() -> None:
    """Let vLLM's ranks meet by a file that lies beside the sockets. It stays where the engine is killed."""
    place = os.environ.get(SOCKETS, "")
    if not Path(place).name.startswith(PREFIX):  # not a private directory of ours
        return
    for name in MEETING:
        module = sys.modules.get(name)
        if hasattr(module, ASKED):
            setattr(module, ASKED, lambda: f"file://{place}/vllm_dist_{uuid.uuid4().hex}")


def hold_counts(run: Path) -> None:
    """Let the counts of several API servers lie in `run`, so that they go with it, unless PROMETHEUS_MULTIPROC_DIR says where they shall.

    vLLM makes a temporary directory without a name of its own, and leaves it there where it is killed.
    """
    if COUNTS in os.environ:
        return

    def in_run() -> None:
        os.makedirs(run / "counts", mode=0o700, exist_ok=True)
        os.environ[COUNTS] = str(run / "counts")

    for name in COUNTERS:
        module = importlib.import_module(name)
        if hasattr(module, COUNTING):
            setattr(module, COUNTING, in_run)


def reclaim() -> list[Path]:
    """Remove every server directory of this user whose lock nobody holds. Returns the removed paths."""
    return [path for path in Path(tempfile.gettempdir()).glob(PREFIX + "*") if _abandoned(path)]


def _abandoned(path: Path) -> bool:
    """Take the directory's lock and remove the directory.

    False, and nothing removed, where it belongs to another user, is not private, is a link, is in use, or has no lock file yet
    (another server is creating it).
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, directory)
        found = os.fstat(directory)
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return False
        lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW, dir_fd=directory)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        return True
    return False
