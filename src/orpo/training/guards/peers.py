"""Several processes: the first cause is told once, by the rank that had it; the others say whose it was and leave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo.checkpoint.publish import PeerError
from orpo.errors import EXIT_BUG
from orpo.system.files import flags
from orpo.system.ranks import Ranks, is_lost_contact, lost_contact

_FAILURE_NAME = ".failure.json"
_WAIT_S = 2.0


@contextmanager
def first_cause(run_dir: Path | str, ranks: Ranks) -> Iterator[None]:
    """Run the body of a distributed run; all ranks enter.

    A rank that fails leaves the others waiting in a collective, where they end with an error about the connection that hides the cause.
    So the failing rank notes its error in the run's folder first, and a rank whose own error is only about the connection raises
    `PeerError` with that note instead, and with its exit code.

    Raises:
        PeerError: another rank failed first, or was lost.
    """
    if ranks.world_size == 1:
        yield
        return
    path = Path(run_dir) / _FAILURE_NAME
    if ranks.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    # All wait for the removal: the note of a rank that fails at once would go with the old one.
    ranks.gather(None)
    try:
        yield
    except PeerError:
        raise
    except BaseException as error:
        if not is_lost_contact(error):
            _note(path, ranks.rank, error)
            raise
        raise _peer_error(path, ranks.rank, error) from None


def _note(path: Path, rank: int, error: BaseException) -> None:
    note = {"rank": rank, "error": f"{type(error).__name__}: {error}"[:2000], "exit_code": getattr(error, "exit_code", EXIT_BUG)}
    try:
        descriptor = os.open(path, flags("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW"), 0o644)
    except OSError:
        return  # another rank was first, or the disk is the problem
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(note, file)


def _peer_error(path: Path, rank: int, error: BaseException) -> PeerError:
    # The connection may break before the note is written, or before a shared file system shows it here.
    end = time.monotonic() + _WAIT_S
    note: dict[str, Any] = {}
    while not note and time.monotonic() < end:
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            time.sleep(0.05)
    if not note:
        return PeerError(f"{lost_contact(rank, error)}; the same command goes on from the newest checkpoint")
    peer = PeerError(f"rank {rank} stops because rank {note['rank']} failed first: {note['error'].splitlines()[0]}")
    peer.exit_code = note["exit_code"]
    return peer
