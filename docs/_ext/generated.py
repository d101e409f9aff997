"""Parts of the reference that are made from the code when the site is built, so that no page can say what the code does not.

A page holds a line `<!-- generated: NAME -->`; NAME is a key of `PARTS`, whose function gives Markdown for that place.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orpo
from orpo.system.callables import CallablePackage

ROOT = Path(orpo.__file__).parent
REPOSITORY = Path(__file__).parents[2]
OUTSIDE = {
    "../benchmarks/comparison/README.md": "two-comparisons.md",
    "../src/orpo/data/demo/GUIDELINE.md": "demo-guideline.md",
    "../../benchmarks/gpu.md": "../gpu-benchmark.md",
}
"""Pages that lie beside what they are about -> the page of the site that holds them."""

_MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, fill(source[0])))
    app.connect("env-before-read-docs", _reread)
    app.connect("autodoc-process-docstring", _callable_package)
    return {"parallel_read_safe": True, "version": "1"}


def _reread(app: Any, env: Any, names: list[str]) -> None:
    """Pages with generated parts change when the code does."""
    for name in env.found_docs:
        if name not in names and _MARKER.search(Path(env.doc2path(name)).read_text(encoding="utf-8")):
            names.append(name)


def _callable_package(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """A package that can be called is documented by what its call does, not by what is in it."""
    if isinstance(found, CallablePackage):
        lines[:] = (inspect.getdoc(found.called) or "").splitlines()


def fill(text: str) -> str:
    """A page with its generated parts, and with links to what lies outside of docs/ led to its page here."""
    for outside, inside in OUTSIDE.items():
        text = text.replace(f"]({outside}", f"]({inside}")
    return _MARKER.sub(lambda match: PARTS[match[1]](), text)


def commands() -> str:
    """Every command with its options, from argparse."""
    from orpo.cli import build_parser, command_modules

    modules = command_modules()
    (subparsers,) = (action for action in build_parser(modules)._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(_command(name, modules[name], subparsers.choices[name]) for name in modules)


def _command(name: str, module: Any, parser: argparse.ArgumentParser) -> str:
    doc = (module.__doc__ or module.HELP).strip()
    keys = "\n\nEvery key of a run is an option as well: [all keys](options.md)." if getattr(module, "TAKES_KEYS", False) else ""
    rows = [_argument(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [row for row in rows if row]
    table = "\n\n| option | |\n|---|---|\n" + "\n".join(rows) if rows else ""
    return f"## orpo {name}\n\n```text\n{doc}\n```{keys}{table}"


def _argument(action: argparse.Action) -> str:
    if action.help == argparse.SUPPRESS:
        return ""
    names = [flag for flag in action.option_strings if "-" not in flag[2:]] or list(action.option_strings)
    metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    shown = " ".join(names) if names else str(action.metavar or action.dest)
    value = f" {metavar}" if names and metavar and action.nargs != 0 else ""
    return f"| `{_cell(shown + value)}` | {_cell(str(action.help or ''))} |"


def _cell(text: str) -> str:
    """Text inside a table's cell, and outside of HTML."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def options() -> str:
    """Every key of a run: default and effect."""
    from transformers import TrainingArguments

    from orpo.config.objectives import option_keys
    from orpo.config.options import ORPOConfig, field_defaults
    from orpo.run.keys import RunKeys, key_types

    inherited = {item.name: item for item in dataclasses.fields(TrainingArguments)}
    own_defaults = {item.name: item.default for item in dataclasses.fields(RunKeys)}
    run = [(item.name, item.default, item.metadata["help"]) for item in dataclasses.fields(RunKeys)]
    trainer, others = [], []
    for item in dataclasses.fields(ORPOConfig):
        if item.name not in key_types() or item.name in own_defaults:
            continue
        row = (item.name, field_defaults()[item.name], item.metadata.get("help") or "")
        is_ours = item.name not in inherited or item.metadata.get("help") != inherited[item.name].metadata.get("help")
        (trainer if is_ours else others).append(row)
    fields = {item.name for item in dataclasses.fields(ORPOConfig)}
    trainer += [(key, option.default, option.help) for key, option in option_keys().items() if key not in fields]
    return "\n\n".join(
        [
            "## Model, data and adapter\n\n" + _table(run),
            "## The objective, the engine and the trainer\n\n" + _table(trainer),
            "## From transformers' TrainingArguments\n\nAs there, but for what [coming from TRL](../trl-compatibility.md) lists.\n\n"
            + _table([(name, default, _first_sentence(text)) for name, default, text in others]),
        ]
    )


def _table(rows: list[tuple[str, Any, str]]) -> str:
    lines = [f"| `{name}` | `{_default(default)}` | {_cell(_plain(text))} |" for name, default, text in rows]
    return "\n".join(["| key | default | |", "|---|---|---|", *lines])


def _default(value: Any) -> str:
    shown = getattr(value, "value", value)
    return "null" if shown is None else str(shown).lower() if isinstance(shown, bool) else _cell(repr(shown) if shown == "" else str(shown))


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".") + ("." if text else "")


def _plain(text: str) -> str:
    """Help texts of transformers hold roles and links of its own documentation."""
    text = re.sub(r"\[`~?([^`\]]+)`\]", r"`\1`", text)
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)


def advice() -> str:
    """Lambda and learning rate by size, with sources."""
    from orpo.config.advice import ADVICE_BY_SIZE, LORA_MEASURED, LORA_SOURCE

    lines = ["| parameters | `orpo_alpha` | `learning_rate` of all weights | where they come from |", "|---|---|---|---|"]
    for item in ADVICE_BY_SIZE:
        size = "more" if item.most_parameters == float("inf") else f"up to {item.most_parameters / 1e9:g} B"
        lines.append(f"| {size} | {item.orpo_alpha:g} | {item.learning_rate:g} | λ: {item.alpha_source}. Rate: {item.rate_source}. |")
    return (
        "\n".join(lines) + f"\n\nFor LoRA `orpo init` writes {LORA_SOURCE}; at 135M that was {LORA_MEASURED.partition(' on ')[0]} (below)."
    )


def recipes() -> str:
    """The packaged configurations, whole."""
    from orpo.config.shipped import list_recipes

    return "\n\n".join(f"## {item.name}\n\n```yaml\n{item.path.read_text(encoding='utf-8').rstrip()}\n```" for item in list_recipes())


def rows() -> str:
    """Why a row is dropped, and what is done to one that is kept."""
    from orpo.data.types import NOTES, REASONS

    dropped = [f"| `{code}` | {_cell(text)} |" for code, text in REASONS.items()]
    kept = [f"| `{code}` | {_cell(text)} |" for code, text in NOTES.items()]
    head = ["| code | |", "|---|---|"]
    return "\n".join(["### Rows that are dropped", "", *head, *dropped, "", "### Rows that are kept, with a note", "", *head, *kept])


def errors() -> str:
    """Every message for the user, read from the sources: what, and how it is mended."""
    tables: dict[str, list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for what, where, mend in sorted(set(_errors_of(path))):
            tables.setdefault(room, []).append(f"| {what} | {where} | {mend} |")
    head = "| message | where | how it is mended |\n|---|---|---|\n"
    return "\n\n".join(f"### {room}\n\n{head}" + "\n".join(lines) for room, lines in tables.items())


_ERRORS = {"UserError", "DataError", "CheckpointError", "GuardStop"}


def _errors_of(path: Path) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS and node.args:
            what = _template(node.args[0])
            named = {keyword.arg: _template(keyword.value) for keyword in node.keywords}
            mend = named.get("mend") or (f"expected: {named['expected']}" if named.get("expected") else "")
            if what:
                yield what, named.get("where", ""), mend


def _template(node: ast.expr) -> str:
    """A message with … for what differs; empty where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _cell(node.value)
    if isinstance(node, ast.JoinedStr):
        return _cell("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (_template(node.body), _template(node.orelse))))
    return ""


def two_comparisons() -> str:
    """The page beside the comparisons' results, with its links seen from docs/."""
    text = (REPOSITORY / "benchmarks" / "comparison" / "README.md").read_text(encoding="utf-8")
    text = text.replace("](../../docs/", "](").replace("[results](results)", "`results`")
    return re.sub(r"\]\((\w+\.svg)\)", r"](../benchmarks/comparison/\1)", text)


PARTS = {
    "two-comparisons": two_comparisons,
    "commands": commands,
    "options": options,
    "advice": advice,
    "recipes": recipes,
    "rows": rows,
    "errors": errors,
}
"""Name in a page -> what stands there."""
