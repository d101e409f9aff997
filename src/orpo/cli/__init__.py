"""The command `orpo`: finds its subcommands, maps errors to exit codes, keeps stdout for results.

A subcommand is a module of this package with NAME, HELP, `add_arguments(parser)` and `run(args) -> int`; its heavy imports are inside
`run`. One that has `before_parsing(words) -> words` may load what declares further options, and add words from a file. One that also has
`TAKES_KEYS = True` gets every argument that it did not declare in `args.keys` (the keys of a run's configuration). One that several
processes do together says `RUNS_IN_PARALLEL = True`; a launcher that starts several of any other is refused.

Exit codes: 0 done, 2 the user's input, 3 stopped by a guard, 130 / 143 stopped by a signal, 1 a bug.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from orpo.cli.helptext import ORDER, CommandsHelp, Help
from orpo.errors import EXIT_OK, EXIT_USER, OrpoError
from orpo.system.console import say_on_stderr
from orpo.system.process import configure_logging, guarded_exit, let_threads_wait

DESCRIPTION = "Odds Ratio Preference Optimization: from preference pairs to a tuned model, in one stage."
_HELPERS = frozenset({"bars", "console", "helptext", "optiontext", "progress"})


def command_modules() -> dict[str, ModuleType]:
    """Subcommand name -> module, in the order of a run's life, then whatever else there is."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name not in _HELPERS]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    commands = {module.NAME: module for module in modules if hasattr(module, "NAME")}
    return dict(sorted(commands.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else len(ORDER), item[0])))


class Parser(argparse.ArgumentParser):
    """Its errors are broken between words, as every message is; argparse's own are cut by the terminal wherever a line ends."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong with it, and leave."""
        self.print_usage(sys.stderr)
        say_on_stderr(f"{self.prog}: error: {message}")
        self.exit(EXIT_USER)


def build_parser(commands: dict[str, ModuleType], chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        commands: all of them.
        chosen: the one whose options are wanted: to know its own, a command may have to import what the others need not. None for all.
    """
    parser = Parser(prog="orpo", description=DESCRIPTION, formatter_class=CommandsHelp, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in commands.items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=(module.__doc__ or module.HELP).strip(),
            formatter_class=Help,
            allow_abbrev=False,
        )
        if chosen is None or name == chosen:
            module.add_arguments(subparser)
        subparser.set_defaults(module=module, keys=[], parser=subparser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what a command that takes keys did not declare goes, in its order, to `args.keys`."""
    commands = command_modules()
    words = list(argv)
    module = commands.get(argv[0]) if argv else None
    if argv and module is None and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(commands)}"
        build_parser(commands, "").error(f"there is no command {argv[0]!r}: {hint}")
    if module is not None and hasattr(module, "before_parsing"):
        argv = [argv[0], *module.before_parsing(argv[1:])]
    parser = build_parser(commands, argv[0] if argv else "")
    args, rest = parser.parse_known_args(argv)
    args.words = words  # as typed, to start the same command again
    if module is not None and getattr(module, "TAKES_KEYS", False):
        args.keys = rest
    elif rest:
        _refuse(rest, getattr(args, "parser", parser))
    return args


def _refuse(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Words that no option takes, with the option that may have been meant, under the usage of the command itself."""
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    near = difflib.get_close_matches(unknown, known, n=1) if unknown else []
    parser.error(f"unrecognized arguments: {' '.join(words)}" + (f" (did you mean {near[0]}?)" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    let_threads_wait()
    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has printed help or a usage error
        return int(stop.code or 0)
    except OrpoError as error:
        say_on_stderr(f"orpo {argv[0]}: {error}")
        return error.exit_code
    if args.version:
        from orpo.system.machine import own_version

        print(f"orpo {own_version()}")
        return EXIT_OK
    if args.command is None:
        build_parser(command_modules(), "").print_help(sys.stderr)
        return EXIT_USER
    configure_logging()
    return guarded_exit(args.command, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if not getattr(args.module, "RUNS_IN_PARALLEL", False):
        from orpo.system.launch import refuse_several

        refuse_several(args.command)
    return int(args.module.run(args))
