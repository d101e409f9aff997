"""Print the shell's completion of this command line: orpo completion bash|zsh|fish

bash: orpo completion bash > ~/.local/share/bash-completion/completions/orpo
zsh:  orpo completion zsh > "${fpath[1]}/_orpo"
fish: orpo completion fish > ~/.config/fish/completions/orpo.fish
Then open a new shell. Commands, their options, the keys of a run's configuration, and names of files are completed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from typing import Any, Literal

from orpo.errors import UserError
from orpo.system.installing import pip_line

NAME = "completion"
HELP = "print the completion script of a shell"

SHELLS = ("bash", "zsh", "fish")

_IS_PATH = re.compile(r"FILE|FOLDER|RUN|MODEL|DATA|COMPARISON|ADAPTER|OUT$")
"""What the name of a value says where it may be a file or folder."""
_PATH_KEYS = frozenset(
    {"model_name_or_path", "dataset_name", "eval_dataset_name", "chat_template", "output_dir", "plugins", "resume_from_checkpoint"}
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("the completion scripts are made by the package shtab", where=NAME, mend=pip_line(NAME)) from error
    print(shtab.complete(whole_parser(shtab.FILE), args.shell))
    return 0


def whole_parser(path: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser with the keys of a run as options of the commands that take them; parsing itself leaves them to the configuration.

    Args:
        path: how each shell completes a file, as shtab takes it.
    """
    from orpo.cli import build_parser, command_modules

    commands = command_modules()
    parser = build_parser(commands)
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, module in commands.items():
        if getattr(module, "TAKES_KEYS", False):
            subparsers.choices[name].add_argument("config", metavar="CONFIG.yaml", nargs="*", help="a run's configuration")
            _add_keys(subparsers.choices[name])
        _mark_paths(subparsers.choices[name], path)
    return parser


def _mark_paths(parser: argparse.ArgumentParser, path: dict[str, Any]) -> None:
    """Say where a name of a file can stand: shtab reads `complete` of an action, here what it calls `FILE`."""
    for action in parser._actions:
        named = (action.metavar if isinstance(action.metavar, str) else None) or action.dest.upper()
        is_path = not action.option_strings or _IS_PATH.search(named) or action.dest in _PATH_KEYS
        if is_path and action.nargs != 0 and not action.choices:
            action.complete = path  # type: ignore[attr-defined]


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
