"""The only place of this package that changes the file system.

Everything that a save, a replacement or a removal does on disk goes through these functions, so that a test can record them and replay
every moment at which the machine may stop (tests/faults/test_checkpoint_crash.py).
"""

from __future__ import annotations

import errno
import functools
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from orpo.errors import UserError

_NO_DIR_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
"""What file systems answer that cannot sync a folder (CIFS, some FUSE); there a rename is as durable as it gets."""


def flags(*names: str) -> int:
    """Flags of `os.open` by their names; what a platform has no word for (Windows: O_NOFOLLOW, O_CLOEXEC) counts as nothing."""
    # Without O_BINARY Windows would translate line ends in what is hashed and written.
    return functools.reduce(int.__or__, (getattr(os, name, 0) for name in (*names, "O_BINARY")))


def make_dir(path: Path) -> None:
    os.mkdir(path)


def write_file(path: Path, data: bytes) -> None:
    """Create a file (never over another, never through a link) and sync its content."""
    descriptor = os.open(path, flags("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_CLOEXEC"), 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    # Windows flushes only what is open for writing; elsewhere reading is enough, also of a file that forbids to be written.
    descriptor = os.open(path, flags("O_RDWR" if os.name == "nt" else "O_RDONLY", "O_NOFOLLOW", "O_CLOEXEC"))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Make the folder's entries durable; without it a rename may be lost with the power."""
    if os.name == "nt":
        return  # a folder cannot be opened there, and NTFS journals its entries
    descriptor = os.open(path, flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC"))
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


def check_writable(folder: str | Path) -> None:
    """Tell a folder that cannot be a run's before anything is loaded; creates nothing.

    Raises:
        UserError: it is a file, or permissions of it or of the nearest folder above it are in the way.
    """
    path = Path(folder).absolute()
    present = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not present.is_dir():
        raise UserError("is not a folder", where=str(present), mend="choose another output_dir")
    if not os.access(present, os.W_OK | os.X_OK):
        raise _unwritable(present, "Permission denied")


def make_run_folder(folder: str | Path) -> None:
    """Create the run's folder.

    Raises:
        UserError: it cannot be created.
    """
    check_writable(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(Path(folder), error.strerror) from error


def _unwritable(folder: Path, reason: str | None) -> UserError:
    return UserError(f"cannot be written ({reason})", where=str(folder), mend="choose another output_dir, or change its permissions")


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, sync, rename over, sync the folder."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, flags("O_WRONLY", "O_CREAT", "O_EXCL"), 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    # An interrupt too. A kill leaves the hidden file, which no reader takes for the real one.
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)
