"""List the configurations that come with the package, or copy some to change them: orpo recipes [NAME …] [--to FOLDER]

`orpo train recipes/NAME.yaml` uses one as it stands, from any folder; keys given as flags go before it. Files for launchers of several
processes are copied in the same way, by their whole names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "recipes"
HELP = "list the packaged configurations and files for launchers, or copy them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to copy; none lists them all")
    parser.add_argument("--to", metavar="FOLDER", default="recipes", help="folder that they are copied into (recipes)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """List or copy."""
    from orpo.config.shipped import copy_recipe, find_recipe, list_launch_files, list_recipes
    from orpo.system.console import print_json, report_console, say

    chosen = [find_recipe(name) for name in args.names]  # all of the names before the first copy
    copies = [copy_recipe(recipe, Path(args.to)) for recipe in chosen]
    shown = chosen or [*list_recipes(), *list_launch_files()]
    if args.json:
        facts = [{"name": recipe.name, "about": recipe.about, "path": str(recipe.path)} for recipe in shown]
        print_json({"recipes": facts, "copies": [str(path) for path in copies]})
        return 0
    console = report_console(is_json=False)
    for path in copies:
        say(console, f"copied       {path}")
    if copies:
        say(console, f"next         {chosen[0].command.format(copies[0])}")
        return 0
    width = max(len(recipe.name) for recipe in shown) + 2
    for recipe in shown:
        say(console, f"{recipe.name:<{width}}{recipe.about}", label_cells=width)
    say(console, f"next         orpo train recipes/{shown[0].name}.yaml   ·   orpo recipes {shown[0].name}   copies it to ./recipes")
    return 0
