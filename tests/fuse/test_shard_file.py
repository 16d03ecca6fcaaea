"""How a shard's bytes reach the disk: past the page cache, through it where that is refused, shared where the file system can."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.fuse.shard_file import PAGE, OpenShard
from sku_vllm.fuse.shard_plan import OutputShard
from tests.fuse.test_fuse_faults import make_adapter, make_base


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[OpenShard]:
    opened = OpenShard(OutputShard("shard", b"", (), 5 * PAGE + 17), tmp_path)
    yield opened
    opened.close()


def page_aligned(data: bytes, shift: int = 0) -> memoryview:
    memory = torch.empty(len(data) + 2 * PAGE, dtype=torch.uint8)
    view = memoryview(memory[-memory.data_ptr() % PAGE + shift :][: len(data)].numpy())
    view[:] = data
    return view


@pytest.mark.parametrize("shift", [0, 8])
def test_every_byte_arrives_whether_the_kernel_takes_it_directly_or_not(shard: OpenShard, tmp_path: Path, shift: int) -> None:
    """Memory that does not begin on a page is refused by the kernel, as a file system without direct writes would."""
    data = os.urandom(4 * PAGE + 17)
    shard.write(page_aligned(data[: 2 * PAGE], shift), 0)
    shard.write(page_aligned(data[2 * PAGE :], shift), 3 * PAGE)
    assert (tmp_path / "shard").read_bytes() == data[: 2 * PAGE] + bytes(PAGE) + data[2 * PAGE :]


def test_what_was_written_leaves_no_pages_in_the_cache(shard: OpenShard, tmp_path: Path) -> None:
    if shard._direct is None:
        pytest.skip("no direct writes on this file system")
    shard.write(page_aligned(bytes(4 * PAGE)), 0)
    found = subprocess.run(["fincore", "--noheadings", "--output", "PAGES", tmp_path / "shard"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no fincore here")
    assert int(found.stdout) == 0


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    image, folder = tmp_path / "image", tmp_path / "btrfs"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 << 20)
    make, mount = ["mkfs.btrfs", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]
    if not shutil.which(make[0]) or any(subprocess.run(command, capture_output=True).returncode for command in (make, mount)):
        pytest.skip("cannot make or mount a btrfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("digests", [True, False])
def test_untouched_chunks_share_the_bases_blocks_where_a_file_system_can(btrfs: Path, digests: bool) -> None:
    base, adapter = make_base(btrfs / "base", per_shard=4), make_adapter(btrfs / "adapter", [0])
    fuse_checkpoint(FuseRequest(base, [(adapter, 1.0)], btrfs / "out", digests=digests))
    if digests:
        verify_checkpoint(btrfs / "out")
    os.sync()
    found = subprocess.run(["btrfs", "filesystem", "du", "--raw", "-s", btrfs / "out"], capture_output=True, text=True, check=True)
    total, _, shared = map(int, re.search(r"(\d+)\s+(\d+)\s+(\d+)\s", found.stdout).groups())
    assert total > 64 << 20 and shared >= 32 << 20  # of eight chunks four are the base's own, whole
