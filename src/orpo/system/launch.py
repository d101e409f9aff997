"""Several processes of one command on this machine, by torch's own launcher: the short form of torchrun.

One start, no restarts: a run that failed is resumed by the same command. Everything talks over the loopback interface.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence

from orpo.errors import ToldElsewhereError, UserError
from orpo.system.place import own_rank, read_place

SHUTDOWN_S = 600
"""How long processes may take to save after a signal before they are killed; torchrun's own 30 s are short for a large model."""


def started_by(environ: Mapping[str, str]) -> str | None:
    """The launcher that has started this process, or None."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "a launcher (RANK is set)" if "RANK" in environ else None


def refuse_several(command: str, mend: str | None = None) -> None:
    """Stop a command that one process does where a launcher has started several: each would do all of it, into the same files.

    Args:
        command: as it is typed behind `orpo`.
        mend: what to do instead, where it is not to start the command alone.

    Raises:
        UserError: on process 0.
        ToldElsewhereError: on the others.
    """
    try:
        place = read_place(os.environ)
    except UserError:  # of a scheduler's allocation, inside which one process was started
        return
    if place.world_size == 1:
        return
    if place.rank:
        raise _told_by_first()
    raise UserError(
        f"{place.said_by} is {place.world_size}: a launcher has started {place.world_size} processes, and this command is done by one",
        where=f"orpo {command}",
        mend=mend
        or f"start it alone: orpo {command} …; `orpo train` and `orpo eval` are what several processes do together, and "
        "`orpo compare --num_processes N` starts its own",
    )


def _told_by_first() -> ToldElsewhereError:
    told = ToldElsewhereError("process 0 says why")
    told.exit_code = UserError.exit_code
    return told


def run_in_several(words: Sequence[str], num_processes: int | None) -> int | None:
    """What `--num_processes` asks for: the same command in so many processes, to its end.

    Args:
        words: the command line.

    Returns:
        The exit code; None where this process does it by itself: one was asked for, none was, or a launcher has started it.

    Raises:
        UserError: the number is none, or a launcher has started this process already.
        ToldElsewhereError: the same, where process 0 says it.
    """
    if num_processes is None:
        return None
    launcher = started_by(os.environ)
    if num_processes < 1:
        raise UserError(f"found {num_processes}", where="--num_processes", expected="at least 1")
    if launcher is not None and num_processes > 1:
        if own_rank():
            raise _told_by_first()
        raise UserError(f"{launcher} has started this process already", where="--num_processes", mend="use one of the two")
    if num_processes > 1:
        return start([sys.executable, "-m", "orpo", *words, "--num_processes", "1"], num_processes)  # the last word counts
    if launcher is None:
        os.environ["WORLD_SIZE"] = "1"  # what a scheduler says of its allocation is not meant
    return None


def start(command: Sequence[str], num_processes: int) -> int:
    """Run a command in several processes, to the end of all.

    Returns:
        The exit code of the process that failed first, or 0; for one that was killed by a signal, and where this process was asked to
        stop and the others have left with it, 128 and the signal's number. The processes say what happened.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say why they stop
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo0" if platform.system() == "Darwin" else "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"orpo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        return _exit_code([failure.exitcode for _, failure in sorted(error.failures.items())])
    return 0


def _exit_code(codes: Sequence[int]) -> int:
    """Of the first cause: the launcher ends the others by SIGTERM as soon as one has failed, and they leave with 143."""
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    code = next((code for code in codes if code not in (*ended, 0)), next((code for code in codes if code), 1))
    return 128 - code if code < 0 else code
