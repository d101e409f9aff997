"""A process that has imported everything and forks a child per command, so that a run to be killed starts in milliseconds.

It never computes anything itself: a fork of a process whose autograd threads have started could not train.

Standard input: one JSON object per line, {"job": name, "logs": a path per rank, "port": n, "arguments": {...}}; a name is that of a
function in faults.jobs, or module:function.
Beside each log FILE.marks has one line per step, saved file and so on (faults.jobs.mark), and nothing else.
Standard output: for each, {"pids": [...]} at once and, at the end of all, {"exits": [[rank, status], ...]};
a status is the exit code, or minus the signal's number.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

import torch


def _run(job: str, arguments: dict[str, object]) -> int:
    from orpo.errors import OrpoError

    module, _, name = job.rpartition(":")
    try:
        getattr(importlib.import_module(module or "faults.jobs"), name)(**arguments)
    except OrpoError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    from faults import jobs

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages that greet whoever imports them
    jobs.import_all()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        ranks = {_fork(command, rank): rank for rank in range(len(command["logs"]))}
        print(json.dumps({"pids": list(ranks)}), file=answers, flush=True)
        exits: list[list[int]] = []
        while len(exits) < len(ranks):
            pid, status = os.wait()
            exits.append([ranks[pid], os.waitstatus_to_exitcode(status)])
        print(json.dumps({"exits": exits}), file=answers, flush=True)
    os._exit(0)  # taking everything that was imported apart takes seconds on a busy machine


def _fork(command: dict[str, Any], rank: int) -> int:
    """Start one rank; its pid."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    log = os.open(command["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ["MARKS"] = f"{command['logs'][rank]}.marks"
    if len(command["logs"]) > 1:
        size = str(len(command["logs"]))
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(command["port"]),
        }  # fmt: skip
    torch.set_num_threads(1)  # a fork's pool of threads is made anew by whoever asks first, and two that ask at once would end the process
    status = _run(command["job"], command["arguments"])
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
