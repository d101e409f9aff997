"""The process: its logging, its signals before a run has guards of its own, and how an error becomes an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orpo.errors import EXIT_BUG, EXIT_OK, GuardStop, OrpoError, SignalStop, ToldElsewhereError, UserError
from orpo.system.console import say_on_stderr
from orpo.system.place import own_rank, read_place

SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "10000"


def let_threads_wait() -> None:
    """Let OpenMP's threads go to sleep soon when they wait for each other, unless the user has said how they wait. Call it before torch is
    loaded, which reads it once.

    By default they spin for milliseconds, on cores that another process, or the thread they wait for, could use (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, SPIN_COUNT)


_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
"""What a disk says that is full or must not be written on; wherever in a command that is met."""
_DISK_MEND = "make room, or choose another place; the same command goes on"


def _file_of(error: OSError) -> str:
    """The file, where the system names it: not for what fails in the middle of a write."""
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the disk of the results"


def guarded_exit(command: str, run: Callable[[], int]) -> int:
    """Run a command; every way out has its exit code and leaves a message without a secret in it."""
    from orpo.system.console import say_on_stderr
    from orpo.system.redact import redact_text

    try:
        with _sigterm_raises():
            code = int(run())
        sys.stdout.flush()
    except ToldElsewhereError as error:
        return error.exit_code
    except (SignalStop, GuardStop) as error:
        if own_rank() == 0:  # all processes of a run stop at one step, for one reason
            say_on_stderr(f"orpo {command}: {error}")
        return error.exit_code
    except OrpoError as error:
        say_on_stderr(f"orpo {command}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        if own_rank() == 0:
            print(f"\norpo {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `orpo … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            told = UserError(f"a file cannot be written: {error.strerror}", where=_file_of(error), mend=_DISK_MEND)
            say_on_stderr(f"orpo {command}: {told}")
            return told.exit_code
        print(redact_text(traceback.format_exc()), file=sys.stderr)
        print("This is a bug in orpo: please report it with the lines above.", file=sys.stderr)
        return EXIT_BUG
    return code


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the command like Ctrl-C does, so that temporary files go and the exit code is 143; training has its own handler."""

    def stop(signum: int, frame: object) -> None:
        raise SignalStop(signum, "stopped by SIGTERM")

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def configure_logging() -> None:
    """Messages of the library to stderr, one line each; those of others only when something is wrong."""
    from orpo.system.console import ConsoleHandler

    handler = ConsoleHandler()
    handler.setFormatter(_Plain())
    root = logging.getLogger("orpo")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    let_first_speak()
    root.propagate = False
    # The libraries' own bars and notes would interleave with ours. A user who sets these variables has the last word.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; of bars that ask nobody, such as that of unpacking GGUF
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_OF_A_MACHINE = "orpo.data.stored"
"""What is said there, such as that a token cache cannot be written, may be so on one machine of several."""


def let_first_speak() -> None:
    """Keep the other processes of a run from saying again what process 0 says of all: rows dropped, an engine that falls back.

    A level that a script has set for them itself is kept.
    """
    try:
        place = read_place(os.environ)
    except UserError:  # told by who asks for the place
        return
    root = logging.getLogger("orpo")
    if place.rank and root.level in (logging.NOTSET, logging.INFO):
        root.setLevel(logging.ERROR)
        if place.local_rank == 0:
            logging.getLogger(_OF_A_MACHINE).setLevel(logging.WARNING)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from orpo.system.redact import redact_text

        text = redact_text(record.getMessage())
        if record.exc_info:
            text += "\n" + redact_text(self.formatException(record.exc_info))
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def show_warnings_plainly() -> None:
    """Python warnings as `warning: text` on stderr, each once, without the source line that means nothing to a user."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if own_rank() == 0 and issubclass(category, UserWarning) and not issubclass(category, (FutureWarning, DeprecationWarning)):
            say_on_stderr(f"warning: {message}")

    warnings.showwarning = show  # type: ignore[assignment]


def quiet_libraries() -> None:
    """Keep transformers', datasets' and Python's own notes from breaking into ours; errors still show."""
    import datasets
    import transformers

    show_warnings_plainly()
    # PEFT's advice on tied layers; what an adapter on them makes of an export is compared with the model before it is published.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
