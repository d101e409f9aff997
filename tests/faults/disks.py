"""Small real file systems, to run out of room on. They need root; where they cannot be had, a test is skipped and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KINDS = ("tmpfs", "ext4")
"""In memory, where a write fails at once; and on a block device, where room is promised at the write and may be missing at the sync."""
_IMAGE_BYTES = 24 * 2**20


@contextmanager
def small_disk(folder: Path, kind: str, free_bytes: int) -> Iterator[Path]:
    """An empty folder on a new file system of a kind, mounted at `folder`, with about so many bytes free."""
    folder.mkdir()
    if kind == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", f"size={free_bytes // 1024}k", "tmpfs", str(folder))
    else:
        image = folder.with_name(f"{folder.name}.img")
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", str(image))  # nothing kept back for root
        _run("mount", "-o", "loop", str(image), str(folder))
    try:
        if kind == "ext4":
            with (folder / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - free_bytes)
        (folder / "empty").mkdir()  # ext4 has a lost+found at its root
        yield folder / "empty"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"a small file system cannot be made here: there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
