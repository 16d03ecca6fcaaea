"""Tells by its first bytes that a file is not what its name says: a pointer, an archive, a web page, or Parquet under another name.

Open this file to name another kind of file that cannot be read as rows.
"""

from pathlib import Path

from sku_vllm.errors import DataError

PARQUET = b"PAR1"
# first bytes, in lower case: what the file is, and what to do
UNREADABLE = {
    b"version https://git-lfs.": "a Git LFS pointer and not the file itself; run `git lfs pull` in its clone, or download the file",
    b"pk\x03\x04": "a zip archive or an Excel file; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it (zstd -d), or compress it with gzip",
    b"\xfd7zxz\x00": "compressed with xz; unpack it (xz -d), or compress it with gzip",
    b"bzh": "compressed with bzip2; unpack it (bunzip2), or compress it with gzip",
    b"arrow1": "an Arrow file; give the directory that datasets.save_to_disk wrote, or save it as Parquet",
    b"<!doctype html": "a web page; download the file itself (on the hub its address has /resolve/ instead of /blob/)",
    b"<html": "a web page; download the file itself (on the hub its address has /resolve/ instead of /blob/)",
}


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file of rows.

    Raises:
        DataError: it cannot be opened, or is of a kind that holds no rows that can be read (`UNREADABLE`).
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the file and its permissions") from error
    lower = begin.lower().lstrip()
    for mark, told in UNREADABLE.items():
        if lower.startswith(mark):
            raise DataError(f"{path}: is {told}")
    return begin
