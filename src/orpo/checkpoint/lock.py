"""One run per folder: the lock that a second run meets, and that a dead run does not leave behind."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from orpo.errors import ToldElsewhereError, UserError
from orpo.system import files as fs
from orpo.system.ranks import ALONE, Ranks

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    _FAR_BYTE = 2**30
    """Beyond what is written in the file: Windows keeps others from reading a byte that is locked."""

    def _lock_now(descriptor: int) -> None:
        """Take the kernel's lock on an open file, or raise OSError at once."""
        os.lseek(descriptor, _FAR_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:  # what Windows says where another process has it
            raise BlockingIOError(*error.args) from None
else:

    def _lock_now(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_ORPHANS_S = 5.0
"""How long a lock is waited for whose holder is dead: a child that it had just forked may not have let go yet."""
_open_descriptors: set[int] = set()


def _close_in_child() -> None:
    """A process that a callback or a library has forked must not keep the lock of a parent that was killed."""
    for descriptor in _open_descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open_descriptors.clear()


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Exclusive hold on a run's folder, as a context manager; all ranks enter, rank 0 takes it and the others share the outcome.

    `flock` on `<run_dir>/.lock` (on Windows a locked byte) decides on one machine: the kernel frees it when its process dies, so a killed
    run leaves nothing stale. Between machines that share a file system `flock` may not reach, so the holder also writes its host and pid
    and touches the file every `beat_s`; a holder on another host whose beat is not seen for three beats counts as dead.

    Raises:
        UserError: another run holds the folder, or the folder cannot be written.
    """

    def __init__(self, run_dir: Path | str, *, ranks: Ranks = ALONE, beat_s: float = 10.0) -> None:
        self.path = Path(run_dir) / LOCK_NAME
        self._ranks, self._beat_s = ranks, beat_s
        self._descriptor: int | None = None
        self._is_folder_ours = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        problem: UserError | None = None
        if self._ranks.is_first:
            try:
                self._acquire()
            except UserError as error:
                problem = error
        message = self._ranks.from_first(None if problem is None else str(problem))
        if message is not None:
            elsewhere = ToldElsewhereError(f"stops with rank 0, which says why ({message.splitlines()[0]})")
            elsewhere.exit_code = UserError.exit_code
            raise problem or elsewhere
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let go. The empty file stays, unless the lock has made the folder and nothing else came into it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                if self._is_folder_ours and [path.name for path in self.path.parent.iterdir()] == [LOCK_NAME]:
                    fs.unlink(self.path)  # while it is ours: who opened it a moment ago finds out and opens it anew
                    fs.remove_dir(self.path.parent)
            _open_descriptors.discard(descriptor)
            os.close(descriptor)

    def _acquire(self) -> None:
        while True:
            descriptor = self._open()
            try:
                has_flock = self._flock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_still_the_file(descriptor):
                break
            os.close(descriptor)  # its folder was removed by a run that ended before it began
        try:
            holder = _read(descriptor)
            if holder and self._is_alive(holder, descriptor, has_flock=has_flock):
                raise self._refusal(holder)
            if holder:
                logger.warning("%s was left by a run that is gone (%s); taking over", self.path, _name(holder))
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            own = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            os.write(descriptor, json.dumps(own).encode())
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _open_descriptors.add(descriptor)
        self._thread = threading.Thread(target=self._beat, name="orpo-run-lock", daemon=True)
        self._thread.start()

    def _open(self) -> int:
        folder = self.path.parent
        try:
            self._is_folder_ours = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, fs.flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_CLOEXEC"), 0o644)
        except OSError as error:
            raise UserError(
                f"the run's folder cannot be written ({error.strerror})", where=str(folder), mend="choose another output_dir"
            ) from None

    def _is_still_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except OSError:
            return False

    def _flock(self, descriptor: int) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        end = time.monotonic() + _ORPHANS_S
        while True:
            try:
                _lock_now(descriptor)
                return True
            except BlockingIOError:
                holder = _read(descriptor)
                is_orphaned = holder.get("host") == socket.gethostname() and not _is_running(holder.get("pid"))
                if not is_orphaned or time.monotonic() > end:
                    raise self._refusal(holder) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise UserError(f"the run's lock cannot be taken ({error})", where=str(self.path)) from None
                return False

    def _is_alive(self, holder: dict[str, Any], descriptor: int, *, has_flock: bool) -> bool:
        """Whether the run that wrote the lock file still runs, given that we hold the kernel's lock where there is one."""
        if holder.get("host") == socket.gethostname():
            # Our own number in it is that of an earlier process: a restarted container gives the same ones again.
            return not has_flock and holder.get("pid") != os.getpid() and _is_running(holder.get("pid"))
        before = os.fstat(descriptor).st_mtime_ns
        logger.warning("%s names a run on another machine (%s); watching it for %.0f s", self.path, _name(holder), 3 * self._beat_s)
        end = time.monotonic() + 3 * self._beat_s
        while time.monotonic() < end:
            time.sleep(min(0.2, self._beat_s))
            os.stat(self.path)  # network file systems refresh their attribute cache on this
            if os.fstat(descriptor).st_mtime_ns != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(OSError, TypeError):
                os.utime(self._descriptor)  # type: ignore[arg-type]

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"another run is using this folder ({_name(holder)})",
            where=str(self.path.parent),
            mend="wait for it, stop it, or choose another output_dir",
        )


def _read(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = json.loads(os.read(descriptor, 4096) or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, started {holder.get('started', '?')}"


def _is_running(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    if os.name == "nt":
        return True  # os.kill would end it there, and the kernel's lock decides
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
