"""Calls a user's function, each time in a process of its own that time and memory limits bound. Run as a script by `verifier.py`.

    python checkchild.py FILE.py FUNCTION SECONDS MEBIBYTES

It imports FILE once, says so in a line, then answers each line of JSON on its input with one: {"score": 1.0} or {"failed": "why"}. For
every call it forks, so that what a call breaks (memory, files left open, an endless loop) is gone with the child. It knows nothing of the
package: what a user's file imports must not meet files of ours, and starting must take milliseconds.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place != __file__.rpartition("/")[0]]  # there `import choice` would find ours

import contextlib
import ctypes
import inspect
import json
import math
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from typing import Any

MOST_BYTES = 1 << 20
"""Of what a call may say."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def serve(path: str, name: str, seconds: float, mebibytes: int) -> None:
    """Answer requests until there are no more."""
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a call at work ends with us, and what it has started
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the user's code prints goes nowhere: stdout is ours
        os.dup2(null, descriptor)
    _control(_PR_SET_CHILD_SUBREAPER, 1)

    def reply(**facts: Any) -> None:
        replies.write(json.dumps(facts) + "\n")
        replies.flush()

    try:
        function = load(path, name)
        takes_row = _takes_row(function)
    except BaseException as error:
        reply(broken=_shown(error, path))
        return
    reply(ready=True)
    for line in requests:
        request = json.loads(line)
        arguments = [request["prompt"], request["answer"], *([request["row"]] if takes_row else [])]
        reply(**call(function, arguments, seconds, mebibytes, [requests.fileno(), replies.fileno()], path))


def load(path: str, name: str) -> Callable[..., Any]:
    """The function of a file, whose folder it may import from."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    sys.dont_write_bytecode = True  # nothing of ours beside the user's file
    loader = SourceFileLoader("orpo_verifier", path)
    module = module_from_spec(ModuleSpec("orpo_verifier", loader, origin=path))
    module.__file__ = path
    sys.modules["orpo_verifier"] = module  # dataclasses look their module up there while they are made
    loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == "orpo_verifier"]
        raise LookupError(f"there is no function {name!r} (found: {', '.join(there) or 'none'})")
    return function


def _takes_row(function: Callable[..., Any]) -> bool:
    """Whether it wants the row as a third argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [item for item in inspect.signature(function).parameters.values() if item.kind in kinds]
    if len(places) < 2:
        raise TypeError("it takes no two arguments: (prompt, answer), or (prompt, answer, row)")
    return len(places) > 2


def call(
    function: Callable[..., Any], arguments: Sequence[Any], seconds: float, mebibytes: int, ours: Sequence[int], path: str
) -> dict[str, Any]:
    """One call in a child; whatever happens there, the result is a dict."""
    reading, writing = os.pipe()
    _hold_end(True)  # between the fork and the wait nobody would end the child
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _hold_end(False)
            _control(_PR_SET_PDEATHSIG, signal.SIGKILL)  # where it, or anybody, kills us: nobody would be left to end it
            for descriptor in (*ours, reading):
                os.close(descriptor)
            _limit(mebibytes)
            os.write(writing, json.dumps(_outcome(function, arguments, path)).encode()[:MOST_BYTES] + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # here too: whoever comes first
    try:
        _hold_end(False)
        said, is_late = _read(reading, time.monotonic() + seconds)
    finally:
        _hold_end(True)
        os.close(reading)
        status = _end(child)
        _hold_end(False)
    try:
        return dict(json.loads(said))
    except ValueError:
        if is_late:
            return {"failed": f"did not end within {seconds:g} s"}
        return {"failed": f"its process ended without a result ({_status_words(status)})"}


def _outcome(function: Callable[..., Any], arguments: Sequence[Any], path: str) -> dict[str, Any]:
    try:
        value = function(*arguments)
    except BaseException as error:
        return {"failed": _shown(error, path)}
    is_number = isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "size", 1) == 1)
    try:
        score = float(value) if is_number else None
    except BaseException:
        score = None
    if score is None or not math.isfinite(score):
        return {"failed": f"gave {repr(value)[:80] if is_number else 'a ' + type(value).__name__}, not a number, True or False"}
    return {"score": score}


def _shown(error: BaseException, path: str) -> str:
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = f" at line {trace.tb_lineno}"
        trace = trace.tb_next
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text[:300]}{line}"


def _limit(mebibytes: int) -> None:
    """So much memory beyond what the process has from the file's imports; files no larger; no core."""
    most = mebibytes * 2**20
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        most += int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, mebibytes * 2**20), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))


def _read(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """(what was said until its line's end or the deadline, whether that came first)."""
    said = b""
    while not said.endswith(b"\n") and len(said) <= MOST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return said, True
        part = os.read(descriptor, 65536)
        if not part:
            break
        said += part
    return said, False


def _end(child: int) -> int:
    """Kill the call with everything it has started, and give the status it ended with."""
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    for _ in range(100):  # who has left the group is ours by now: its parent is gone
        left = _children()
        if not left:
            break
        for other in left:
            with contextlib.suppress(OSError):
                os.kill(other, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(-1, 0)
    return status


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _hold_end(is_held: bool) -> None:
    """Let the signal that ends us wait, or no longer."""
    signal.pthread_sigmask(signal.SIG_BLOCK if is_held else signal.SIG_UNBLOCK, {signal.SIGTERM})


def _control(option: int, value: int) -> None:
    """Linux's prctl, where there is one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _status_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
