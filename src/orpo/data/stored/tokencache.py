"""The cache of token groups: one folder per key, written once and then only read, by any number of processes.

A folder takes its name when all of it is written and synced. Who writes holds the key's lock; others wait for it and read what was written.
The kernel frees the lock of a process that dies, and what it had written so far is removed by the next.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.data.stored.content import hash_file, state_of
from orpo.data.stored.groups import StoredGroups
from orpo.system import files as fs
from orpo.system.replace import replaced_folder

logger = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"
GROUPS_NAME, FACTS_NAME = "groups.arrow", "facts.json"
FOLDER_NAME = "orpo-tokens"
MIN_BYTES = 4 << 20
"""Of the sources of a set that is cached by itself: what is smaller is tokenised in a second or two."""

_STAGING = re.compile(r"\.([0-9a-f]{64})-[0-9a-f]{8}")
_WAIT_S = 0.2


def cache_folder(wanted: str | None) -> Path | None:
    """Where token groups are kept: the user's cache of the `datasets` library, or the folder that is named; None: nowhere.

    Args:
        wanted: `auto`, `none` (or None), or a folder.
    """
    if wanted is None or wanted == NONE:
        return None
    if wanted != AUTO:
        return Path(wanted).expanduser()
    return default_folder()


def default_folder() -> Path:
    """Beside what the `datasets` library keeps, by its own variables; without loading it."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(hub, "datasets")).expanduser() / FOLDER_NAME


@dataclass(frozen=True, slots=True)
class CachedSet:
    """What the cache holds under a key: the groups, and the facts that were kept with them."""

    groups: StoredGroups
    facts: dict[str, Any]


class TokenCache:
    """Sets of token groups in a folder. Creating the object touches nothing.

    Args:
        folder: see `cache_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> CachedSet | None:
        """What is kept under a key; None where nothing is, or something that is damaged."""
        place = self.folder / key
        try:
            facts = json.loads((place / FACTS_NAME).read_text(encoding="utf-8"))
            if facts["num_bytes"] != (place / GROUPS_NAME).stat().st_size:
                raise ValueError(f"{GROUPS_NAME} has another size than when it was written")
            groups = StoredGroups(place / GROUPS_NAME, whole_fingerprint=facts["fingerprint"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the token cache's %s cannot be used (%s); the rows are tokenised again", place, error)
            return None
        with suppress(OSError):
            os.utime(place)  # when it was last of use
        return CachedSet(groups, facts)

    def get(self, key: str, write: Callable[[Path], dict[str, Any]], wait: Callable[[], None]) -> tuple[CachedSet, bool]:
        """What is kept under a key, written first where it is not there yet, by one process of all that ask.

        Args:
            write: writes `GROUPS_NAME` into a folder, and gives the facts to keep.
            wait: called once, if another process is at it.

        Returns:
            The set, and whether it was there.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            Exception: what `write` raises; nothing is kept then.
        """
        if (found := self.find(key)) is not None:
            return found, True
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(key, wait):
            # Asked again: whoever held the lock may have written it meanwhile.
            if (found := self.find(key)) is not None:
                return found, True
            self._sweep(key)
            with replaced_folder(self.folder / key) as staging:
                facts = write(staging)
                facts["num_bytes"] = (staging / GROUPS_NAME).stat().st_size
                facts["written_unix_s"] = round(time.time())
                (staging / FACTS_NAME).write_text(json.dumps(facts, default=str), encoding="utf-8")
        found = self.find(key)
        if found is None:
            raise OSError(f"{self.folder / key} was removed just now")
        return found, False

    @contextmanager
    def _lock(self, key: str, wait: Callable[[], None]) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            wait()
            lock.acquire(poll_interval=_WAIT_S)
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, key: str) -> None:
        """Remove what dead writers have left, of this key and of others that nobody writes."""
        from filelock import FileLock, Timeout

        for path in list(self.folder.iterdir()):
            match = _STAGING.fullmatch(path.name)
            if match is None:
                continue
            with suppress(OSError, Timeout):
                if match[1] == key:
                    fs.remove_tree(path)  # of this key we hold the lock ourselves
                else:
                    with FileLock(self.folder / f"{match[1]}.lock", blocking=False):
                        fs.remove_tree(path)

    def file_hash(self, path: Path) -> str:
        """The hash of a file's content, known again for as long as nobody has written the file."""
        noted = self.folder / "hashes" / state_of(path)
        try:
            return noted.read_text(encoding="ascii")
        except (OSError, ValueError):
            found = hash_file(path)
        with suppress(OSError):
            noted.parent.mkdir(parents=True, exist_ok=True)
            fs.write_atomically(noted, found.encode())
        return found

    def facts(self) -> dict[str, Any]:
        """Its place, how many sets it holds, and their size."""
        sizes = []
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):
                    if (path / FACTS_NAME).is_file():
                        sizes.append((path / GROUPS_NAME).stat().st_size)
        return {"folder": str(self.folder), "num_sets": len(sizes), "num_bytes": sum(sizes)}
