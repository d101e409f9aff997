"""Code from outside of the package: objectives and evaluation tasks that it does not bring itself.

Two ways lead in. An installed package names its module under an entry point group (`orpo.objectives`, `orpo.tasks`) and is found without
a word. Or the user names modules and files in `plugins`. Either way the module is imported and registers what it brings
(`orpo.objective.register` and its like), so that nothing here knows what an objective or a task is.

Trust: a plugin is Python that runs with the user's rights, like any package that is installed. So one is loaded only where the user has
named it, in this configuration, on this command line or in this script, or has installed it: never because the folder of a run, a
checkpoint or a data set names it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from orpo.errors import UserError

logger = logging.getLogger(__name__)

OBJECTIVES, TASKS = "orpo.objectives", "orpo.tasks"
"""The entry point groups."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """Code that was loaded.

    Attributes:
        name: as the user wrote it, or the entry point's name.
        path: its file; "" for a module without one.
        sha256: of that file; "" likewise. A run that is resumed says whether the code is still the same.
    """

    name: str
    path: str
    sha256: str


_LOADED: dict[str, Plugin] = {}
_INSTALLED: dict[str, dict[str, UserError]] = {}


def load_plugins(names: Sequence[str] | str | None, *, where: str = "plugins") -> tuple[Plugin, ...]:
    """Import modules and files, each once per process; what they bring they register themselves.

    Args:
        names: dotted modules, or Python files (a name that ends in `.py` or holds a `/`), relative to the current folder.
        where: what an error names: the key, the flag or the line of the configuration.

    Raises:
        UserError: a name that leads nowhere, or code that fails; with the line it failed at.
    """
    given = [names] if isinstance(names, str) else list(names or [])
    return tuple(_load(name, where) for name in given)


def load_installed(group: str) -> dict[str, UserError]:
    """Import what installed packages offer under an entry point group, once per process.

    A package that fails to load is no reason to stop a run that does not need it: it is warned of.

    Returns:
        Name of each entry point that failed -> why, for whoever looks for that very name.
    """
    if group in _INSTALLED:
        return _INSTALLED[group]
    failed = _INSTALLED[group] = {}
    for entry in entry_points(group=group):
        where = f"the installed package {entry.dist.name if entry.dist else '?'} ({group}: {entry.name})"
        try:
            _LOADED[f"{group}:{entry.name}"] = _plugin(entry.name, _import(entry.module, where))
        except UserError as error:
            failed[entry.name] = error
            logger.warning("%s", error)
    return failed


def loaded_plugins() -> tuple[Plugin, ...]:
    """Everything that was loaded so far, by name."""
    return tuple(sorted(_LOADED.values(), key=lambda plugin: plugin.name))


def plugin_sha256(cls: type) -> str | None:
    """Hash of the file that a class comes from, where a plugin brought it: a resumed run must not go on with other code."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return next((plugin.sha256 for plugin in _LOADED.values() if path and plugin.path == path), None)


def _load(name: str, where: str) -> Plugin:
    is_file = name.endswith(".py") or "/" in name or os.sep in name
    key = str(Path(name).expanduser().resolve()) if is_file else name
    if key not in _LOADED:
        _LOADED[key] = _plugin(name, _import_file(name, Path(key), where) if is_file else _import(name, where))
    return _LOADED[key]


def _plugin(name: str, module: ModuleType) -> Plugin:
    path = getattr(module, "__file__", None) or ""
    return Plugin(name, path, hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else "")


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _broken(name, error, where) from error
        file = Path(f"{name.replace('.', '/')}.py")
        mend = f"for the file here write ./{file}" if file.is_file() else "install its package, or name a file: ./my_plugin.py"
        raise UserError(f"there is no module {name!r}", where=where, expected="a module that can be imported", mend=mend) from error
    except (ValueError, TypeError) as error:  # "", "..x"
        raise UserError(f"found {name!r}", where=where, expected="a module or a Python file") from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error, where) from error


def _import_file(name: str, path: Path, where: str) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        what = "is no Python file" if path.exists() else "does not exist"
        near = difflib.get_close_matches(path.name, [item.name for item in path.parent.glob("*.py")], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"paths start at the current folder, {Path.cwd()}"
        raise UserError(f"{name} {what}", where=where, expected="a Python file, *.py", mend=hint)
    # The whole path is in the name, so that two files called the same are two modules.
    module_name = f"orpo_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    loader = SourceFileLoader(module_name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(module_name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[module_name] = module  # dataclasses look their module up there while they are made
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _broken(name, error, where, path) from error
    return module


def _broken(name: str, error: BaseException, where: str, path: Path | None = None) -> UserError:
    """Code that failed while it was imported: what it said, and the last line of its own that was reached."""
    if isinstance(error, UserError):
        return UserError(f"{name}: {error.where}: {error.what}", where=where, expected=error.expected, mend=error.mend)
    if isinstance(error, SyntaxError):
        at = f" at {error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if path is None or frame.filename == str(path)]
        own = [frame for frame in own if "importlib" not in frame.filename and frame.filename != __file__]
        at = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return UserError(f"{name} cannot be loaded: {type(error).__name__}: {text}{at}", where=where, mend="mend that line, or leave it out")
