"""Write a whole folder beside its place and let it take that place, so that a stop at any moment leaves the old folder or the new one."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo.system import files as fs

logger = logging.getLogger(__name__)

_REPLACED = ".replaced-"


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; it takes the target's name once the block is through, and nothing of it stays where the block fails.

    Between the two renames of a replacement the old folder is kept under a name of its own; whoever writes here next puts it back, if
    the process was killed just then (`recover_folder`).

    Raises:
        OSError: the disk is full, or the place cannot be written; the old folder is untouched.
    """
    recover_folder(target)
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    fs.make_dir(staging)
    try:
        yield staging
        for path in fs.walk_files(staging):
            fs.sync_file(path)
        for directory in list(fs.walk_dirs(staging)):
            fs.sync_dir(directory)
        _swap(staging, target)
    finally:
        _remove(staging)


def _swap(staging: Path, target: Path) -> None:
    try:
        if os.path.lexists(target):
            fs.rename(target, target.with_name(f"{_REPLACED}{target.name}-{secrets.token_hex(4)}"))
            fs.sync_dir(target.parent)
        fs.rename(staging, target)
        fs.sync_dir(target.parent)
    finally:  # a signal may have come between the two renames
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Undo or finish a replacement that was cut short: the old folder goes back where no new one stands, else it is removed."""
    pattern = re.compile(re.escape(f"{_REPLACED}{target.name}-") + "[0-9a-f]{8}")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        if not pattern.fullmatch(path.name) or not fs.is_plain_dir(path):
            continue
        if os.path.lexists(target):
            _remove(path)
        else:
            fs.rename(path, target)
            fs.sync_dir(target.parent)


def _remove(folder: Path) -> None:
    """Remove a folder of ours, if it is there; what cannot be removed is said and left."""
    try:
        if fs.is_plain_dir(folder):
            fs.remove_tree(folder)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", folder, error)
