"""Print the shell's completion of this command line: orpo completion bash|zsh|fish

bash: orpo completion bash > ~/.local/share/bash-completion/completions/orpo
zsh:  orpo completion zsh > "${fpath[1]}/_orpo"
fish: orpo completion fish > ~/.config/fish/completions/orpo.fish
Then open a new shell. Commands, their options, and the keys of a run's configuration are completed.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, Literal

from orpo.errors import UserError
from orpo.system.installing import pip_line

NAME = "completion"
HELP = "print the completion script of a shell"

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("the completion scripts are made by the package shtab", where=NAME, mend=pip_line(NAME)) from error
    print(shtab.complete(whole_parser(), args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the keys of a run as options of the commands that take them; parsing itself leaves them to the configuration."""
    from orpo.cli import build_parser, command_modules

    commands = command_modules()
    parser = build_parser(commands)
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, module in commands.items():
        if getattr(module, "TAKES_KEYS", False):
            _add_keys(subparsers.choices[name])
    return parser


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from orpo.config.options import ORPOConfig
    from orpo.run.keys import RunKeys, key_types

    helps = {item.name: item.metadata.get("help") for kind in (RunKeys, ORPOConfig) for item in dataclasses.fields(kind)}
    group = parser.add_argument_group("keys of the configuration")
    for key, hint in key_types().items():
        if f"--{key}" not in parser._option_string_actions:
            group.add_argument(f"--{key}", choices=_choices(hint), help=_one_line(helps.get(key)))


def _choices(hint: Any) -> list[str] | None:
    """The words that a key accepts, where they are few and known."""
    kinds = [hint, *typing.get_args(hint)]
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            return [str(word) for word in typing.get_args(kind)]
    return ["true", "false"] if bool in kinds and str not in kinds else None


def _one_line(text: str | None) -> str | None:
    """The first sentence; argparse reads % as the start of a name."""
    return None if text is None else " ".join(text.split()).partition(". ")[0].replace("%", "%%")
