"""What an evaluation task is, and the one list of those that there are.

A task is a class with a name that registers itself:

    from orpo.evaluate.task import Task, TaskOption, register

    @register
    class Rhymes(Task):
        name = "rhymes"
        help = "how many answers rhyme"
        options = (TaskOption("rhyme_prompts", "file with prompts", Path),)

        def run(self, session):
            answers = session.answers(read_prompts(session.option("rhyme_prompts")), session.sampling(64))
            return {"share": estimate_share([rhymes(answer.text) for answer in answers]).to_dict()}

        def lines(self, result):
            yield f"{result['share']['value']:.0%} rhyme"

        def show(self, result):
            return Shown("Rhymes", scores=[Score("rhyming answers", result["share"], ".1%", is_better=1)])

Its options become flags of `orpo eval`, its result lies in `<folder>/<name>.json`, and `show` is kept beside it as plain data, so that a
report draws a task that it has never heard of. A task of this package is a file in `tasks/` and a line in `tasks/__init__.py`; one from
outside is a module that an installed package names under the entry points `orpo.tasks`, or that the user names in `plugins`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.session import Session
    from orpo.inference.ready import Subject
    from orpo.report.shown import Shown

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskOption:
    """An option of a task: `--name` of `orpo eval`, a key of its YAML, an entry of `EvalOptions.given`.

    Attributes:
        help: what it is, for people.
        kind: makes the value from text; `bool` is a flag without a value.
        is_repeated: may be given several times; the value is a tuple.
        default: where it is not given.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = str
    metavar: str | None = None
    is_repeated: bool = False
    default: Any = None


class Task:
    """A task of `orpo eval`. One object does one evaluation and may keep what it has found in itself.

    What is asked of a model belongs into `measure`: every model is loaded once for all tasks, and gone before the next one is loaded. A
    task that asks the evaluated model alone can do so in `run`, too (`session.answers`).

    Attributes:
        name: of the task and its result's file.
        help: what it measures, in a few words.
        options: those that no other task has.
        takes_answers: published answers can be given for it (`--answers`).
        generates, asks_judge: False where it never does; options of sampling and of judges that were given in vain are said then.
    """

    name: ClassVar[str]
    help: ClassVar[str] = ""
    options: ClassVar[tuple[TaskOption, ...]] = ()
    takes_answers: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    asks_judge: ClassVar[bool] = True

    @classmethod
    def check(cls, options: EvalOptions) -> None:
        """Refuse options that cannot be meant, before anything is read or loaded.

        Raises:
            UserError: the first such option.
        """

    def prepare(self, session: Session) -> tuple[str, ...]:
        """Read what is needed before a model is loaded.

        Returns:
            The models that `measure` is to be called with, of `session.sides` ("against", "model"); none where `run` does it all.
        """
        return ()

    def measure(self, session: Session, which: str, subject: Subject) -> None:
        """Ask one of the models. Keep no reference to it: the next one needs its memory."""

    def run(self, session: Session) -> Record:
        """The result, as JSON takes it.

        Raises:
            UserError: it cannot be done; the other tasks are.
        """
        raise NotImplementedError

    def lines(self, result: Record) -> Iterable[str]:
        """The result for the terminal."""
        return ()

    def show(self, result: Record) -> Shown | None:
        """The result for a report."""
        return None


_TASKS: dict[str, type[Task]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_OTHER_FILES = frozenset({"demo", "report", "run", "comparison"})
"""Names of other files beside results."""

Registered = TypeVar("Registered", bound=type[Task])


def register(task: Registered) -> Registered:
    """Add a task to those that there are; for use as a decorator.

    Raises:
        UserError: its name is none, is taken, or one of its options is another task's.
    """
    name = getattr(task, "name", None)
    where = f"the task {task.__module__}.{task.__qualname__}"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _OTHER_FILES:
        raise UserError(f"its name is {name!r}", where=where, expected="small letters, digits, - and _; it names a file")
    known = _TASKS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise UserError(f"there is a task {name!r} already: {known.__module__}.{known.__qualname__}", where=where, mend="take another name")
    taken = {option.name: other for other in _TASKS.values() if other.name != name for option in other.options}
    for option in task.options:
        if not option.name.isidentifier() or option.name in taken:
            owner = f"one of the task {taken[option.name].name}" if option.name in taken else "no name for an option"
            raise UserError(f"its option {option.name!r} is {owner}", where=where, mend=f"call it {name.replace('-', '_')}_…")
    _TASKS[name] = task
    return task


def known_tasks() -> dict[str, type[Task]]:
    """Name -> task, in the order in which they were registered."""
    return dict(_TASKS)


def find_task(name: str) -> type[Task]:
    """The task of a name.

    Raises:
        UserError: there is none.
    """
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        mend = f"did you mean {near[0]}?" if near else "a task of your own is loaded with --plugins FILE.py"
        raise UserError(f"there is no task {name!r}", where="--tasks", expected="some of " + ", ".join(_TASKS), mend=mend)
    return _TASKS[name]
