"""Publish a checkpoint so that a stop at any moment leaves either the old state or the new one, never something between.

The protocol: stage on the same file system, sync, barrier, manifest, rename by rank 0, sync the parent. Pruning is the caller's next step
(`retain.prune`), after this has returned.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, checked_name, hash_files, read_manifest, remember_verified
from orpo.checkpoint.retain import aside_name, checkpoint_name, list_checkpoints, remove_owned
from orpo.errors import EXIT_BUG, EXIT_USER, CheckpointError, OrpoError, ToldElsewhereError
from orpo.system import files as fs
from orpo.system.machine import versions
from orpo.system.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXTS = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122")
_TOO_LARGE_TEXTS = ("file too large", "os error 27")
"""How safetensors, written in Rust, words what the system said: its errors are no OSError and carry no number."""


class PeerError(OrpoError):
    """Another rank failed first; its own error is the cause and is told there."""


class ToldByPeerError(PeerError, ToldElsewhereError):
    """The same where that rank is there to tell it: the command line says nothing more on this one."""


def publish(
    run_dir: Path | str,
    step: int,
    write: Callable[[Path], None],
    *,
    facts: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Write and publish `checkpoint-<step>`; all ranks call it, rank 0 publishes.

    Args:
        run_dir: the run's folder, shared by all ranks.
        step: optimizer steps done.
        write: writes this rank's files into the folder it is given. Names must differ between ranks.
        facts: JSON-able; goes into the manifest (data fingerprint, configuration, ...).
        ranks: the processes of the run.

    Returns:
        The published folder. An existing one of the same step has been replaced, without a moment at which neither is whole.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing of this save remains and earlier checkpoints are untouched.
        PeerError: another rank failed; nothing was published.
        Exception: whatever `write` raised on this rank, after the clean-up.
    """
    run_dir = Path(run_dir)
    staging = run_dir / f".staging-{checkpoint_name(step)}-{ranks.from_first(secrets.token_hex(4))}"
    # Folders apart until all are done: two ranks that wrote the same name would write over each other, and nobody would know.
    own = staging if ranks.is_first else staging / f".rank-{ranks.rank}"
    try:
        _all_or_none(run_dir, ranks, lambda: _make_staging(run_dir, staging) if ranks.is_first else None)
        written = _all_or_none(run_dir, ranks, lambda: _write_own(own, write, is_first=ranks.is_first))
        target = _all_or_none(
            run_dir, ranks, lambda: _finish(run_dir, staging, step, written, facts, ranks.world_size) if ranks.is_first else None
        )[0]
    # An interrupt too: what it leaves behind would stay until the next start.
    except BaseException as error:
        raised: BaseException = error
        if ranks.is_first:
            num_written = _discard(staging)
            raised = _explain(error, run_dir, num_written)
        elif isinstance(error, Exception):
            raised = _explain(error, run_dir, 0)
        if raised is error:
            raise
        raise raised from error
    return Path(target)


def _all_or_none(run_dir: Path, ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """Every rank's result, or an error on every rank: its own where it failed, `PeerError` elsewhere and, of a disk that fails for several
    alike, on all but the first of them."""
    result, failure, told = None, None, None
    try:
        result = work()
    # Not BaseException: a rank that is told to leave at once leaves, and the others find it gone instead of waiting for its answer.
    except Exception as error:
        failure = error
        told = (f"{type(error).__name__}: {error}", getattr(_explain(error, run_dir, 0), "exit_code", EXIT_BUG))
    outcomes = ranks.gather((result, told))
    for rank, (_, other) in enumerate(outcomes):
        if failure is not None and (rank == ranks.rank or told is None or told[1] != EXIT_USER):
            raise failure
        if other is not None:
            peer = ToldByPeerError(f"nothing was saved: rank {rank} failed first ({other[0].splitlines()[0]})")
            peer.exit_code = other[1]
            raise peer
    return [value for value, _ in outcomes]


def _make_staging(run_dir: Path, staging: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    fs.make_dir(staging)


def _write_own(own: Path, write: Callable[[Path], None], *, is_first: bool) -> dict[str, FileEntry]:
    """Let this rank write its files, then sync and hash each."""
    if not is_first:
        if not own.parent.is_dir():
            raise CheckpointError(
                "this rank does not see the folder that rank 0 made", where=str(own.parent), expected="a run folder shared by all ranks"
            )
        fs.make_dir(own)
    write(own)
    paths = [path for path in sorted(fs.walk_files(own)) if not path.relative_to(own).parts[0].startswith(".rank-")]
    for path in paths:
        fs.sync_file(path)
    names = [checked_name(path.relative_to(own).as_posix(), str(own)) for path in paths]
    return dict(zip(names, hash_files(paths), strict=True))


def _finish(run_dir: Path, staging: Path, step: int, written: list[dict[str, FileEntry]], facts: dict[str, Any], world_size: int) -> str:
    """Rank 0, after the barrier: bring the ranks' files together, write the manifest, sync, rename, sync the parent."""
    files = dict(written[0])
    for rank, entries in enumerate(written[1:], start=1):
        own = staging / f".rank-{rank}"
        for name, entry in entries.items():
            if name in files:
                raise CheckpointError(f"ranks 0 to {rank} wrote {name!r} more than once", where=str(staging))
            files[name] = entry
            _make_parents(staging, name)
            fs.rename(own / name, staging / name)
        for directory in list(fs.walk_dirs(own)):
            fs.remove_dir(directory)
    manifest = Manifest(step, world_size, files, facts, versions())
    fs.write_file(staging / MANIFEST_NAME, manifest.to_bytes())
    # Before the rename: after a power cut the name must not be there with entries missing under it.
    for directory in list(fs.walk_dirs(staging)):
        fs.sync_dir(directory)
    target = run_dir / checkpoint_name(step)
    replaced = _set_aside(target)
    fs.rename(staging, target)
    fs.sync_dir(run_dir)
    # Every rank hashed what it wrote a moment ago; pruning, which comes next, need not read it all again.
    remember_verified(target, manifest)
    if replaced is not None:
        remove_owned(replaced)
    return str(target)


def _make_parents(staging: Path, name: str) -> None:
    for parent in reversed(Path(name).parents[:-1]):
        if not fs.is_plain_dir(staging / parent):
            fs.make_dir(staging / parent)


def _set_aside(target: Path) -> Path | None:
    """Move what has the name already out of the way; one of our own is kept findable until the new one stands (`retain.recover`)."""
    if not os.path.lexists(target):
        return None
    try:
        read_manifest(target)
        aside = target.with_name(aside_name("replaced", target.name))
    except CheckpointError:
        aside = target.with_name(f"{target.name}.foreign-{secrets.token_hex(4)}")
        logger.warning("%s is not one of our checkpoints; it was moved to %s", target, aside.name)
    fs.rename(target, aside)
    fs.sync_dir(target.parent)
    return aside if aside.name.startswith(".") else None


def _discard(staging: Path) -> int:
    """Remove the staging folder; the bytes that were in it. Never raises: the first error is the one to tell."""
    try:
        num_bytes = sum(os.lstat(path).st_size for path in fs.walk_files(staging))
        if fs.is_plain_dir(staging):
            fs.remove_tree(staging)
        return num_bytes
    except OSError as error:
        logger.warning("the staging folder %s could not be removed now (%s); the next start removes it", staging, error)
        return 0


def _explain(error: BaseException, run_dir: Path, written_bytes: int) -> BaseException:
    """An error of the disk, told with figures; any other error as it is."""
    if isinstance(error, OrpoError) or not isinstance(error, Exception):
        return error
    if (isinstance(error, OSError) and error.errno == errno.EFBIG) or any(text in str(error).lower() for text in _TOO_LARGE_TEXTS):
        return CheckpointError(
            f"a file of the checkpoint is larger than may be written here ({error}); what was written of it has been removed, earlier "
            "checkpoints are untouched",
            where=str(run_dir),
            mend="raise the limit on file sizes (ulimit -f), or point output_dir at another disk; the same command resumes",
        )
    is_full = (isinstance(error, OSError) and error.errno in _FULL) or any(text in str(error).lower() for text in _FULL_TEXTS)
    if not is_full and not isinstance(error, OSError):
        return error
    if not is_full:
        return CheckpointError(f"the checkpoint could not be written ({error}); earlier checkpoints are untouched", where=str(run_dir))
    free = shutil.disk_usage(run_dir).free
    needed = max((_size_of(path) for path in list_checkpoints(run_dir)), default=0)
    amount = f"{needed:,}" if needed else f"more than {max(written_bytes, free):,}"
    return CheckpointError(
        f"no room for the checkpoint: it needs {amount} bytes, {free:,} are free; what was written of it has been removed, "
        "earlier checkpoints are untouched",
        where=str(run_dir),
        mend="free space on that disk, or point output_dir at another; then run the same command again: it resumes",
    )


def _size_of(folder: Path) -> int:
    try:
        return read_manifest(folder).num_bytes
    except CheckpointError:
        return 0
