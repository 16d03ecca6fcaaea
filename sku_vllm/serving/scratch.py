"""Private directories of servers: locked by whoever uses them, reclaimed when everybody who did is dead."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "sku-serve-"
LOCK = "lock"


def private_directory() -> tuple[Path, int]:
    """A new directory (0700) and a descriptor that holds its lock; a process that inherits the descriptor holds it too.

    Directories of servers that were killed, adapters in them, are removed first.
    """
    reclaim()
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path, lock


def reclaim() -> list[Path]:
    """Remove every private directory of ours whose lock nobody holds any more; what was removed."""
    return [path for path in Path(tempfile.gettempdir()).glob(PREFIX + "*") if _abandoned(path)]


def _abandoned(path: Path) -> bool:
    """Take the directory's lock and remove it; False where it is not ours, not private, reached by a link, in use, or unlocked
    (another server is just making it)."""
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
