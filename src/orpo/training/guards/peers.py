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
from orpo.errors import EXIT_BUG, ToldElsewhereError, UserError
from orpo.system.files import flags
from orpo.system.ranks import Ranks, is_lost_contact, lost_contact

_FAILURE_NAME = ".failure.json"
_WAIT_S = 2.0


@contextmanager
def first_cause(run_dir: Path | str, ranks: Ranks) -> Iterator[None]:
    """Run the body of a distributed run; all ranks enter.

    A rank that fails leaves the others waiting in a collective, where they end with an error about the connection that hides the cause.
    So the failing rank notes its error in the run's folder first, and a rank whose own error is only about the connection raises
    `PeerError` with that note instead, and with its exit code. What several ranks meet alike, the first of them tells.

    Raises:
        PeerError: another rank failed first, or was lost.
        ToldElsewhereError: another rank has told the same error of the user's.
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
    except (PeerError, ToldElsewhereError):
        raise
    except BaseException as error:
        if is_lost_contact(error):
            raise _peer_error(path, ranks.rank, error) from None
        note = {"rank": ranks.rank, "error": f"{type(error).__name__}: {error}"[:2000], "exit_code": getattr(error, "exit_code", EXIT_BUG)}
        first = note if _note(path, note) else _read(path)
        if isinstance(error, UserError) and first.get("rank") != ranks.rank and first.get("error") == note["error"]:
            told = ToldElsewhereError(f"rank {first['rank']} says why")
            told.exit_code = error.exit_code
            raise told from error
        raise


def _note(path: Path, note: dict[str, Any]) -> bool:
    """Leave a note for the others; False where another rank was first, or the disk is the problem."""
    try:
        descriptor = os.open(path, flags("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW"), 0o644)
    except OSError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(note, file)
    return True


def _read(path: Path) -> dict[str, Any]:
    """The first rank's note, waited for a little: the connection may break before it is written, or before a shared file system shows it
    here. Empty where there is none."""
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            time.sleep(0.05)
    return {}


def _peer_error(path: Path, rank: int, error: BaseException) -> PeerError:
    note = _read(path)
    if not note:
        return PeerError(f"{lost_contact(rank, error)}; the same command goes on from the newest checkpoint")
    peer = PeerError(f"rank {rank} stops because rank {note['rank']} failed first: {note['error'].splitlines()[0]}")
    peer.exit_code = note["exit_code"]
    return peer
