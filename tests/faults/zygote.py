"""A process that has imported everything and forks a child per command, so that a run to be killed starts in milliseconds.

It never computes anything itself: a fork of a process whose autograd threads have started could not train.

Standard input: one JSON object per line, {"job": name in faults.jobs, "log": path, "arguments": {...}}.
Standard output: for each, {"pid": n} at once and {"status": n} at its end: the exit code, or minus the signal's number.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def _run(job: str, arguments: dict[str, object]) -> int:
    from faults import jobs
    from orpo.errors import OrpoError

    try:
        getattr(jobs, job)(**arguments)
    except OrpoError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    import torch

    from faults import jobs

    torch.set_num_threads(1)
    jobs.import_all()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            status = _run(command["job"], command["arguments"])
            sys.stdout.flush()
            os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
