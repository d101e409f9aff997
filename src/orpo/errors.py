"""The few errors that are meant for the user.

Each says what is wrong, where, what was expected and how to mend it, and carries the exit code that the command line leaves with.
Anything else that escapes is a bug: traceback, exit code 1.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_GUARD = 3


class OrpoError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = EXIT_BUG


class UserError(OrpoError):
    """The input is wrong: configuration, data, model folder, command line.

    Args:
        what: the problem, in one sentence, with the value found.
        where: file and line, key, or row.
        expected: what would have been right.
        mend: what to do about it.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, *, where: str | None = None, expected: str | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.expected, self.mend = what, where, expected, mend
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.mend:
            lines.append(f"  to mend it: {self.mend}")
        return "\n".join(lines)


class UserErrors(UserError):
    """Several problems, told in one go."""

    def __init__(self, problems: list[UserError], *, title: str) -> None:
        self.problems = problems
        self.title = title
        super().__init__(title)

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"- {problem}" for problem in self.problems)])


class DataError(UserError):
    """A whole file, column or data set cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or does not belong to this run."""


class GuardStop(OrpoError):
    """A guard stopped the run: non-finite loss or gradient, nothing learns. The last checkpoint is intact."""

    exit_code = EXIT_GUARD


class SignalStop(OrpoError):
    """A signal stopped the run, after one checkpoint where that was possible."""

    def __init__(self, signum: int, message: str) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(message)


class ToldElsewhereError(OrpoError):
    """This process stops with the others of its run, and another one says why; the command line says nothing more."""
