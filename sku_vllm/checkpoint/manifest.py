"""`sku_manifest.json`: what a fused checkpoint was made from, how much of the edit each tensor kept, and the digest of every file.

A file's digest is sha256 over the sha256s of its 8 MiB chunks, so that chunks can be hashed in parallel. The
manifest holds no times and no paths, so the same inputs and backend give the same bytes. Open this file to change what `sku verify` checks.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sku_vllm.checkpoint.safetensors_file import CHUNK
from sku_vllm.errors import CheckpointError, ConfigError, NegativeResult
from sku_vllm.output import write_json, write_text

MANIFEST, SIGNATURE = "sku_manifest.json", "sku_manifest.sig"
README = "README.md"
LARGEST_KEY = 1 << 20


def file_digest(file: Path) -> str:
    """Hex sha256 over the sha256s of the file's 8 MiB chunks."""
    size = file.stat().st_size

    def leaf(start: int) -> bytes:
        with open(file, "rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(CHUNK)).digest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return combine(list(pool.map(leaf, range(0, size, CHUNK))))


def file_digests(directory: Path, leaves: Mapping[str, Mapping[int, bytes]]) -> dict[str, str]:
    """The digest of every file below a directory but README.md, by its name there, sorted.

    The README is for people, and the hub edits it.

    leaves: sha256 of every chunk by its first byte, for files whose chunks were hashed while they were written.
    """
    found = (str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    names = sorted(name for name in found if name != README)
    known = {name: combine([leaf for _, leaf in sorted(parts.items())]) for name, parts in leaves.items()}
    return {name: known.get(name) or file_digest(directory / name) for name in names}


def combine(leaves: list[bytes]) -> str:
    """The digest of a file from its chunks' digests, in order."""
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def write_manifest(directory: Path, manifest: dict[str, Any], key: bytes | None = None) -> None:
    """Write `sku_manifest.json`, and with a signing `key` also `sku_manifest.sig`: the HMAC-SHA256 of the manifest's bytes, in hex."""
    write_json(directory / MANIFEST, manifest)
    if key is not None:
        write_text(directory / SIGNATURE, _signature(directory, key) + "\n")


def read_key(file: str | Path) -> bytes:
    """A signing key: any file of 16 bytes to 1 MiB, read once since it may be a pipe. Raises ConfigError."""
    try:
        with open(file, "rb") as stream:
            key = stream.read(LARGEST_KEY + 1)
    except OSError as error:
        raise ConfigError(f"--signing-key {file}: {error.strerror}; make one with: head -c 32 /dev/urandom > {file}") from error
    if len(key) < 16:
        raise ConfigError(f"--signing-key {file}: {len(key)} bytes are too few; make one with: head -c 32 /dev/urandom > {file}")
    if len(key) > LARGEST_KEY:
        raise ConfigError(f"--signing-key {file}: is more than {LARGEST_KEY} bytes; make one with: head -c 32 /dev/urandom > KEY")
    return key


def _signature(directory: Path, key: bytes) -> str:
    return hmac.new(key, (directory / MANIFEST).read_bytes(), hashlib.sha256).hexdigest()


def verify_checkpoint(directory: str | Path, signing_key: str | Path | None = None) -> dict[str, Any]:
    """Compare every file of a fused checkpoint with its manifest.

    Returns:
        {"verified": True, "files", "bytes", "signed", "aside"}. aside: hidden files and folders that the manifest does not list, such as
        the hub's `.gitattributes` and `.cache/`; no loader reads them.
    Raises:
        NegativeResult: naming every file that differs, is missing, was added, or lies outside the directory; or a wrong signature.
        CheckpointError: there is nothing to verify.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if signing_key is not None:
        key = read_key(signing_key)
        if not (directory / SIGNATURE).is_file():
            raise NegativeResult(f"{directory / SIGNATURE}: is missing, so nothing shows that the manifest is yours")
        if not hmac.compare_digest((directory / SIGNATURE).read_bytes().strip(), _signature(directory, key).encode()):
            raise NegativeResult(
                f"{directory / MANIFEST}: its signature does not match the key; the manifest was changed or signed with another key"
            )
    files = manifest.get("files")
    if not files:
        raise CheckpointError(
            f"{directory / MANIFEST}: was written with --no-digests, so there is nothing to compare; fuse again without it"
        )
    wrong = []
    for name, digest in files.items():
        problem = _why_not_a_file(directory, name)
        if problem:
            wrong.append(problem)
        elif file_digest(directory / name) != digest:
            wrong.append(f"{name} differs")
    hidden = {entry.name for entry in directory.iterdir() if entry.name.startswith(".")}
    shown = [entry for entry in directory.iterdir() if entry.name not in hidden]
    inside = [file for entry in shown for file in (entry, *(entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else ()))]
    present = {str(file.relative_to(directory)) for file in inside if file.is_symlink() or not file.is_dir()}
    wrong += [f"{name} was added" for name in sorted(present - set(files)) if not _is_ours(name)]
    if wrong:
        raise NegativeResult(f"{directory}: {'; '.join(wrong)}")
    size = sum((directory / name).stat().st_size for name in files)
    aside = sorted(name for name in hidden if not any(file == name or file.startswith(f"{name}/") for file in files))
    return {"verified": True, "files": len(files), "bytes": size, "signed": signing_key is not None, "aside": aside}


def _why_not_a_file(directory: Path, name: str) -> str | None:
    """Why `name` must not be opened; None for a regular file in the directory, or a link to one, as in the Hugging Face cache."""
    try:
        folder, _, file = f"{os.path.realpath(directory)}/{name}".rpartition("/")
        inside = os.path.realpath(folder) == folder and file not in ("", ".", "..")
    except ValueError:  # a name with a zero byte, or with half a surrogate pair
        inside = False
    if not inside:
        return f"{name!r} leads out of the directory"
    if not os.path.lexists(directory / name):
        return f"{name} is missing"
    return None if os.path.isfile(directory / name) else f"{name} is no regular file"


def _is_ours(name: str) -> bool:
    """Whether it is a report that an sku command wrote beside a model, or the README; no loader reads those."""
    return name == README or "/" not in name and name.startswith("sku_") and name.endswith((".json", ".sig"))


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the one that sku fuse wrote")
    if not os.path.lexists(directory / MANIFEST):
        raise CheckpointError(f"{directory / MANIFEST}: is missing; only what sku fuse wrote can be verified")
    if problem := _why_not_a_file(directory, MANIFEST):
        raise NegativeResult(f"{directory}: {problem}")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NegativeResult(f"{directory / MANIFEST}: cannot be read as JSON; it was changed") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
        raise NegativeResult(f"{directory / MANIFEST}: is not a manifest; it was changed")
    return manifest
