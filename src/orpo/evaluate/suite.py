"""An evaluation: every task that was asked for, each model loaded once for all of them, `<folder>/<task>.json` for each.

A task that cannot be done does not keep the others from being done; what went wrong is told at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orpo.evaluate.tasks  # noqa: F401  the tasks that ship register themselves
from orpo.errors import UserError
from orpo.evaluate.crew import Alone
from orpo.evaluate.options import EvalOptions
from orpo.evaluate.session import Progress, Record, Session, Tell
from orpo.evaluate.task import Task, find_task, known_tasks

__all__ = ["Evaluation", "lines_of", "load_tasks", "warnings_of"]


def load_tasks(plugins: tuple[str, ...] = (), *, where: str = "--plugins") -> None:
    """Make known the tasks that ship, those of installed packages, and those that these modules and files bring.

    Raises:
        UserError: a plugin cannot be loaded.
    """
    from orpo.system.plugins import TASKS, load_installed, load_plugins

    load_installed(TASKS)
    load_plugins(plugins, where=where)


@dataclass
class _Job:
    """A task at work.

    Attributes:
        sides: the models that it measures.
        used: the models that its result is of.
        start_s, wall_s: when its newest part began; time spent on the parts before, the models' loading included.
    """

    task: Task
    sides: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)
    start_s: float = 0.0
    wall_s: float = 0.0


class Evaluation:
    """An evaluation of one target.

    Args:
        options: what to do.
        tell: receives lines for the user.
        progress: receives (what, done, total).
        crew: the processes that share what takes long; None for this one alone.

    Raises:
        UserError: the options do not fit together.
    """

    def __init__(
        self,
        options: EvalOptions,
        tell: Tell = lambda line: None,
        progress: Progress = lambda what, done, total: None,
        crew: Alone | None = None,
    ) -> None:
        load_tasks(options.plugins)
        options.check()
        _check_tasks(options)
        defaults = {option.name: option.default for task in known_tasks().values() for option in task.options}
        self.options = replace(options, given={**defaults, **options.given})
        self.session = Session(self.options, tell, progress, crew)
        self._jobs = {name: _Job(find_task(name)()) for name in options.tasks}
        self._errors: dict[str, UserError] = {}

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.session.folder

    def run(self) -> tuple[dict[str, Record], dict[str, UserError]]:
        """Do all tasks; (records by task, errors by task)."""
        with self.session.crew.at_work():
            return self._run()

    def _run(self) -> tuple[dict[str, Record], dict[str, UserError]]:
        session, records = self.session, {}
        for name in self._jobs:
            self._attempt(name, self._prepare)
        for which in session.sides:
            for name, job in self._jobs.items():
                if which in job.sides:
                    self._attempt(name, self._measure, which)
        for name in self._jobs:
            record = self._attempt(name, self._finish)
            if record is not None:
                records[name] = record
        session.release()
        return records, self._errors

    def _prepare(self, job: _Job) -> None:
        job.sides = job.task.prepare(self.session)

    def _measure(self, job: _Job, which: str) -> None:
        # The model has no name here, nor in `run`: nobody but the session holds it, since the next one needs its room.
        job.task.measure(self.session, which, self.session.subject(which))

    def _finish(self, job: _Job) -> Record:
        result = job.task.run(self.session)
        shown = job.task.show(result)
        wall_s = job.wall_s + time.perf_counter() - job.start_s
        return self.session.write_result(job.task.name, result, None if shown is None else shown.to_dict(), job.used, wall_s)

    def _attempt(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        """A part of a task; None once a part of it has failed."""
        if name in self._errors:
            return None
        job = self._jobs[name]
        job.start_s = time.perf_counter()
        try:
            with self.session.models_of_task(job.used):
                return do(job, *args)
        except UserError as error:
            if len(self._jobs) == 1:
                raise
            self._errors[name] = _without_frames(error)
            self.session.tell(f"{name} could not be done: {error}")
            return None
        finally:
            job.wall_s += time.perf_counter() - job.start_s


def _without_frames(error: UserError) -> UserError:
    """The error without the calls that led to it: they would hold the model that was being asked."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _check_tasks(options: EvalOptions) -> None:
    if not options.tasks:
        raise UserError("found nothing", where="--tasks", expected="some of " + ", ".join(known_tasks()))
    tasks = [find_task(name) for name in options.tasks]
    replayed = [name for name, task in known_tasks().items() if task.takes_answers]
    if options.answers is not None and (len(tasks) != 1 or not tasks[0].takes_answers):
        raise UserError(
            f"given answers belong to one task, not to {', '.join(options.tasks)}",
            where="--answers",
            expected="--tasks with one of " + ", ".join(replayed),
        )
    if options.target is None and options.answers is None:
        raise UserError("there is nothing to evaluate", where="orpo eval", expected="a run, a model, or --answers FILE")
    declared = {option.name for task in known_tasks().values() for option in task.options}
    if unknown := sorted(options.given.keys() - declared):
        raise UserError(f"no task has the option {unknown[0]!r}", where="EvalOptions.given", expected=", ".join(sorted(declared)))
    for task in tasks:
        task.check(options)


def lines_of(record: Record) -> list[str]:
    """A record for the terminal."""
    name = record["target"] or record["answers"]
    return ["", f"{record['task']}: {name}", *(f"  {line}" for line in find_task(record["task"])().lines(record["result"]))]


def warnings_of(records: dict[str, Record]) -> list[str]:
    """What has to be known before any number is read: the warnings that the tasks show."""
    statements = [one for record in records.values() for one in (record["show"] or {}).get("statements", ())]
    return [one["text"] for one in statements if one["tone"] == "warn"]
