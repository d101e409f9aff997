"""The recipes that come with the package: commented configurations to start from, and files for launchers of several processes.

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


_LAUNCH = {
    "fsdp2.yaml": ("accelerate: FSDP2", "accelerate launch --config_file {} --num_processes 8 -m orpo train run.yaml"),
    "zero3.yaml": ("accelerate: DeepSpeed's ZeRO-3", "accelerate launch --config_file {} --num_processes 8 -m orpo train run.yaml"),
    "zero2.json": ("DeepSpeed: ZeRO-2", "orpo train run.yaml --num_processes 8 --deepspeed {}"),
    "zero3.json": ("DeepSpeed: ZeRO-3", "orpo train run.yaml --num_processes 8 --deepspeed {}"),
    "slurm.sbatch": ("Slurm: several machines, one task per GPU", "sbatch {} run.yaml"),
    "ray_train.py": ("Ray Train: one worker per process, started again when one is lost", "python {} 8 run.yaml"),
}
"""Files for launchers: what each is for, and the command that uses it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A packaged file.

    Attributes:
        name: of a configuration without its ending, of a file for a launcher with it.
        path: where it is.
        about: the first sentence of its comment, or what it is for.
        command: what uses it, with `{}` in the place of the file.
    """

    name: str
    path: Path
    about: str
    command: str = "orpo check {} --dataset_name YOUR.jsonl"


def list_recipes() -> list[Recipe]:
    """All configurations, by name."""
    return [Recipe(path.stem, path, _about(path)) for path in sorted(FOLDER.glob("*.yaml"))]


def list_launch_files() -> list[Recipe]:
    """All files for launchers."""
    return [Recipe(name, FOLDER / "launch" / name, *told) for name, told in _LAUNCH.items()]


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
    """A recipe by name, with or without `recipes/` and `.yaml`; a file for a launcher by its name.

    Raises:
        UserError: there is none of that name.
    """
    import difflib

    known = {recipe.name: recipe for recipe in [*list_recipes(), *list_launch_files()]}
    if Path(name).name in known:
        return known[Path(name).name]
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
