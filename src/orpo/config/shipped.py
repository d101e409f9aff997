"""The recipes that come with the package: commented configurations to start from.

They are package data, so that `orpo train recipes/demo.yaml`, as documents write it, works from a wheel and in any folder: a path
`recipes/NAME.yaml` that is not there means the packaged one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from orpo.errors import UserError

FOLDER = Path(__file__).parents[1] / "recipes"
_PREFIX = "recipes"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A packaged configuration: `name` without its ending, and the first sentence of its comment."""

    name: str
    path: Path
    about: str


def list_recipes() -> list[Recipe]:
    """All of them, by name."""
    return [Recipe(path.stem, path, _about(path)) for path in sorted(FOLDER.glob("*.yaml"))]


def _about(path: Path) -> str:
    """The sentence that a recipe's comment begins with."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:])
    text = " ".join(comment)
    return text.partition(". ")[0].partition(": ")[0].rstrip(".")


def find_recipe(name: str) -> Recipe:
    """A recipe by name, with or without `recipes/` and `.yaml`.

    Raises:
        UserError: there is none of that name.
    """
    import difflib

    known = {recipe.name: recipe for recipe in list_recipes()}
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known:
        return known[stem]
    near = difflib.get_close_matches(stem, known, n=1)
    raise UserError(
        "there is no such recipe",
        where=name,
        expected=f"one of {', '.join(known)}",
        mend=f"did you mean {near[0]!r}?" if near else None,
    )


def packaged_path(path: Path) -> Path:
    """The packaged file for `recipes/NAME.yaml` where no such file is there; every other path as it is."""
    if path.exists() or path.parent != Path(_PREFIX):
        return path
    packaged = FOLDER / path.name
    return packaged if packaged.is_file() else path


def copy_recipe(recipe: Recipe, folder: Path) -> Path:
    """Copy one into a folder, which is made where it is not there. A file of the same name and content is left as it is.

    Raises:
        UserError: another file of that name is there, or the folder cannot be written.
    """
    target = folder / recipe.path.name
    if target.exists():
        if target.is_file() and target.read_bytes() == recipe.path.read_bytes():
            return target
        raise UserError("is there already, with another content", where=str(target), mend="name another folder with --to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe.path, target)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(target), mend="name another folder with --to") from error
    return target
