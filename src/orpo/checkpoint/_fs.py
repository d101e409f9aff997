"""The only place of this package that changes the file system.

Everything that a save, a replacement or a removal does on disk goes through these functions, so that a test can record them and replay
every moment at which the machine may stop (tests/faults/test_checkpoint_crash.py).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_NO_DIR_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
"""What file systems answer that cannot sync a folder (CIFS, some FUSE); there a rename is as durable as it gets."""


def make_dir(path: Path) -> None:
    os.mkdir(path)


def write_file(path: Path, data: bytes) -> None:
    """Create a file (never over another, never through a link) and sync its content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Make the folder's entries durable; without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIR_SYNC:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def unlink(path: Path) -> None:
    os.unlink(path)


def remove_dir(path: Path) -> None:
    os.rmdir(path)


def is_plain_dir(path: Path) -> bool:
    """A folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def walk_files(folder: Path) -> Iterator[Path]:
    """Everything under the folder that is not a folder, links included and never followed."""
    for root, directories, names in os.walk(folder, followlinks=False):
        for name in [*names, *(name for name in directories if os.path.islink(os.path.join(root, name)))]:
            yield Path(root) / name


def walk_dirs(folder: Path) -> Iterator[Path]:
    """The folder's subfolders, deepest first, then the folder itself; links are not folders."""
    for root, _, _ in os.walk(folder, topdown=False, followlinks=False):
        yield Path(root)


def remove_tree(folder: Path) -> None:
    """Remove a folder that is wholly ours (a staging folder). Links in it are removed, never followed."""
    for path in list(walk_files(folder)):
        unlink(path)
    for directory in list(walk_dirs(folder)):
        remove_dir(directory)
