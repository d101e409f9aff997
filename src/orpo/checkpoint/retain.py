"""Find, prune and tidy checkpoints. Nothing is removed that no manifest of ours owns."""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from orpo.checkpoint.manifest import MANIFEST_NAME, is_verified, read_manifest, verify
from orpo.errors import CheckpointError
from orpo.system import files as fs
from orpo.system.ranks import ALONE, Ranks
from orpo.system.replace import recover_folder

logger = logging.getLogger(__name__)

MIN_KEPT = 2
"""The newest verified checkpoints that stay whatever the limit: one may be damaged by the disk."""

_PUBLISHED = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.(staging|replaced|removed)-(checkpoint-\d+)-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.upload-model|\.(upload|model|adapter)-[a-z0-9_]{8}")
"""Copies on their way to a hub, and final weights that were being written."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of a published checkpoint."""
    return f"checkpoint-{step}"


def _step_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def aside_name(kind: str, name: str) -> str:
    """A hidden name for a checkpoint on its way out (`replaced`, `removed`)."""
    return f".{kind}-{name}-{secrets.token_hex(4)}"


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """Folders named `checkpoint-<step>`, newest first, verified or not; links are left out."""
    run_dir = Path(run_dir)
    found = [(int(match[1]), path) for path in _entries(run_dir) if (match := _PUBLISHED.fullmatch(path.name)) and fs.is_plain_dir(path)]
    return [path for _, path in sorted(found, reverse=True)]


def _entries(run_dir: Path) -> list[Path]:
    return sorted(run_dir.iterdir()) if run_dir.is_dir() else []


def _set_aside(run_dir: Path, kind: str) -> list[tuple[Path, str]]:
    """Hidden folders of a kind, each with the name of the checkpoint it was, or was to be."""
    matches = [(path, _ASIDE.fullmatch(path.name)) for path in _entries(run_dir)]
    return [(path, match[2]) for path, match in matches if match and match[1] == kind and fs.is_plain_dir(path)]


def find_newest(run_dir: Path | str, *, ranks: Ranks = ALONE) -> Path | None:
    """The newest checkpoint that verifies, or None.

    Those that do not are named in a warning each, with what is wrong, and passed over. Only rank 0 reads the files.
    """
    return ranks.from_first(_find_newest(Path(run_dir)) if ranks.is_first else None)


def _find_newest(run_dir: Path) -> Path | None:
    candidates = [(_step_of(path.name), True, path) for path in list_checkpoints(run_dir)]
    candidates += [(_step_of(name), False, path) for path, name in _set_aside(run_dir, "replaced")]
    for _, _, path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
        else:
            return path
    return None


def recover(run_dir: Path | str, *, ranks: Ranks = ALONE) -> None:
    """Finish or undo what a dead run left half done. Call it once at start, holding the run's lock, before `find_newest`.

    Staging folders go, and half-written final weights, which are written again; a checkpoint that was set aside for a replacement that
    never came is put back; an unfinished removal is finished.
    """
    run_dir = Path(run_dir)
    if ranks.is_first:
        # A staging folder may have no manifest yet to go by; its random name is ours alone, and the lock says that nobody writes in it.
        for path, _ in _set_aside(run_dir, "staging"):
            logger.info("removing %s, left by a run that was stopped while saving", path)
            fs.remove_tree(path)
        for path, name in _set_aside(run_dir, "replaced"):
            if os.path.lexists(run_dir / name):
                remove_owned(path)
            else:
                fs.rename(path, run_dir / name)
                fs.sync_dir(run_dir)
        for path, _ in _set_aside(run_dir, "removed"):
            remove_owned(path)
        for name in ("model", "adapter"):
            recover_folder(run_dir / name)
        for path in [path for path in _entries(run_dir) if _TEMPORARY.fullmatch(path.name) and fs.is_plain_dir(path)]:
            fs.remove_tree(path)
    ranks.gather(None)


def set_earlier_aside(run_dir: Path | str, *, with_files: Sequence[str] = (), after_step: int = -1) -> Path | None:
    """Make room for a run that starts anew, or goes on from `after_step`, in a folder with checkpoints of an earlier one; rank 0 alone
    calls it, holding the run's lock.

    Retention and resume go by the step, so checkpoints of two runs must not stand side by side: the new run's would count as the older
    ones. They move to `earlier-<n>`, together with the named files; where there are no checkpoints, what the files tell is of steps that
    are lost, and they are removed.

    Returns:
        The new folder, or None if there was no checkpoint.
    """
    run_dir = Path(run_dir)
    checkpoints = [path for path in list_checkpoints(run_dir) if _step_of(path.name) > after_step]
    files = [run_dir / name for name in with_files if _is_file_or_link(run_dir / name)]
    if not checkpoints:
        for path in files:
            fs.unlink(path)
        return None
    number = next(number for number in itertools.count(1) if not os.path.lexists(run_dir / f"earlier-{number}"))
    target = run_dir / f"earlier-{number}"
    logger.warning(
        "%s holds an earlier run that is not resumed; its %d checkpoints%s are moved to %s",
        *(run_dir, len(checkpoints), f" after step {after_step}" if after_step >= 0 else "", target),
    )
    fs.make_dir(target)
    for path in [*files, *checkpoints]:
        fs.rename(path, target / path.name)
    fs.sync_dir(target)
    fs.sync_dir(run_dir)
    return target


def prune(run_dir: Path | str, *, keep: int | None, best: Path | str | None = None) -> list[Path]:
    """Remove old checkpoints; rank 0 alone calls it, after `publish` has returned.

    Args:
        run_dir: the run's folder.
        keep: `save_total_limit`; None keeps all. The newest two that verify stay whatever it says.
        best: the best checkpoint so far (path or name). It stays, and counts within the limit as far as the newest two leave room.

    Returns:
        The folders that were removed. Damaged ones count for nothing: those older than all that stay are removed like others, newer ones
        are left to look at. A folder without our manifest, and files in a checkpoint that its manifest does not name, are never touched.
    """
    if keep is None:
        return []
    best_name = Path(best).name if best is not None else None
    checkpoints = list_checkpoints(run_dir)
    newest = _newest_verified(checkpoints, max(keep, MIN_KEPT))
    if best_name in {path.name for path in checkpoints} - {path.name for path in newest}:
        newest = newest[: max(keep - 1, MIN_KEPT)]  # the best takes one of the places
    if len(newest) < MIN_KEPT:  # of a single whole one nothing older is given up
        return []
    older = checkpoints[checkpoints.index(newest[-1]) + 1 :]
    return [path for path in older if path.name != best_name and _remove(path)]


def _newest_verified(checkpoints: list[Path], number: int) -> list[Path]:
    found: list[Path] = []
    for path in checkpoints:
        if len(found) == number:
            break
        if is_verified(path):
            found.append(path)
    return found


def _remove(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError as error:
        logger.warning("not removed: %s", error)
        return False
    # Out of its name first, in one stroke: a kill amid the removal leaves no checkpoint that looks whole.
    aside = path.with_name(aside_name("removed", path.name))
    fs.rename(path, aside)
    fs.sync_dir(path.parent)
    remove_owned(aside)
    return True


def remove_owned(aside: Path) -> None:
    """Remove a folder that was set aside: the files its manifest names, the manifest, and the folders that are then empty.

    Whatever else is in it goes back to where it was found, under the checkpoint's own name or one beside it.
    """
    owned: list[str] = []
    try:
        owned = list(read_manifest(aside).files)
    except CheckpointError as error:
        if any(fs.walk_files(aside)):
            logger.warning("not removed: %s", error)
            return
    for name in owned:
        if all(fs.is_plain_dir(aside / parent) for parent in list(Path(name).parents)[:-1]) and _is_file_or_link(aside / name):
            fs.unlink(aside / name)
    if any(path.name != MANIFEST_NAME or path.parent != aside for path in fs.walk_files(aside)):
        _give_back(aside)
        return
    for directory in [path for path in fs.walk_dirs(aside) if path != aside]:
        fs.remove_dir(directory)
    fs.sync_dir(aside)  # the manifest goes last, or a power cut could leave files that nothing owns
    if os.path.lexists(aside / MANIFEST_NAME):
        fs.unlink(aside / MANIFEST_NAME)
    fs.remove_dir(aside)


def _is_file_or_link(path: Path) -> bool:
    return os.path.lexists(path) and not fs.is_plain_dir(path)


def _give_back(aside: Path) -> None:
    """Files that were not ours stay, in a folder of the checkpoint's name."""
    match = _ASIDE.fullmatch(aside.name)
    name = match[2] if match else aside.name.lstrip(".")
    target = aside.with_name(name)
    if os.path.lexists(target):
        target = aside.with_name(f"{name}.foreign-{secrets.token_hex(4)}")
    logger.warning("%s holds files that are not the checkpoint's own; they are left in %s", name, target)
    if _is_file_or_link(aside / MANIFEST_NAME):
        fs.unlink(aside / MANIFEST_NAME)
    fs.rename(aside, target)
    fs.sync_dir(aside.parent)
