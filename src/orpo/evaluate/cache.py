"""What was answered and judged is never asked for again: results kept under a hash of everything that they depend on.

One JSON object per line in an append-only file, written whole in one call. A process killed at any moment leaves at most one broken line,
which is passed over; everything before it counts when the same command runs again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from orpo.errors import UserError

logger = logging.getLogger(__name__)


class Cache:
    """A file of results by key. Safe to use from several threads.

    Args:
        path: the file; it and its folder are made with the first result. None keeps results in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._needs_newline = False
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The result, or None where there is none yet."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a result; a later one of the same key replaces it.

        Raises:
            UserError: it cannot be written.
        """
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            self._values[key] = value
            if self.path is not None:
                self._append(self.path, line)

    def _read(self, path: Path) -> None:
        num_broken = 0
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror}", where=str(path), mend="remove the file, or mend its permissions"
            ) from error
        self._needs_newline = bool(lines[-1])
        for line in lines:
            if not line:
                continue
            try:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                num_broken += 1
        if num_broken:
            logger.warning("%s: %d broken line(s) passed over; what they held is made again", path, num_broken)

    def _append(self, path: Path, line: bytes) -> None:
        if self._needs_newline:  # behind what a killed process left
            line = b"\n" + line
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._needs_newline = True
            raise UserError(
                f"a result cannot be kept: {error.strerror}",
                where=str(path),
                mend="make room, or choose another place; what was kept before is not lost",
            ) from error
        self._needs_newline = False
