"""Splits: their names, how files announce them, and slices of them such as `train[:10%]`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from orpo.errors import DataError

Row = TypeVar("Row")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
    "eval": ("eval", "evaluation", "heldout"),
}
"""A split's name -> the words that mean it."""
_STANDS_IN = {"test": "eval"}
"""Rows called `eval` are taken where `test` is asked for and there is none; who asks for `eval` does not get the test rows."""
_HOLD_OUT = "to hold rows out, eval_fraction: 0.1 in place of dataset_test_split, or eval_dataset_name: FILE"

_SLICE = re.compile(r"(?P<name>[^\[\]]*)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")
_SLICES = "rows as in Python, or percent: train[:10], train[-100:], train[10%:50%]"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" where a known name is near, else nothing."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a split's rows, in their order: bounds as in a Python slice, or texts such as `10%`; None is the end on that side."""

    start: str | None
    stop: str | None

    def take(self, open_rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """The rows of the slice. Bounds that need the number of rows have the source read twice, the first time to count."""
        if self.needs_length:
            num_rows = sum(1 for _ in open_rows())
            bounds = [_bound(self.start, num_rows), _bound(self.stop, num_rows)]
        else:
            bounds = [None if bound is None else int(bound) for bound in (self.start, self.stop)]
        return islice(open_rows(), *bounds)

    @property
    def needs_length(self) -> bool:
        """Whether a bound is a percentage, or counted from the end."""
        return any(bound is not None and not bound.isdecimal() for bound in (self.start, self.stop))


def needs_length(split: str) -> bool:
    """Whether a split names a part that is known only with all rows."""
    found = _SLICE.fullmatch(split.strip())
    return found is not None and Slice(found["start"], found["stop"]).needs_length


def _bound(text: str | None, num_rows: int) -> int | None:
    """A bound as a number of rows from the start; a percentage is rounded to the nearest row, as `datasets` does."""
    if text is None:
        return None
    number = round(int(text.removesuffix("%")) * num_rows / 100) if text.endswith("%") else int(text)
    return max(number + num_rows, 0) if text.startswith("-") else number


def read_split(split: str | None, where: str) -> tuple[str | None, Slice | None]:
    """(name, slice) of `train`, `train[:10%]` or `[:10]`; None for what is not said.

    Raises:
        DataError: brackets that hold no slice.
    """
    if split is None or not {"[", "]"} & set(split):
        return split or None, None
    found = _SLICE.fullmatch(split.strip())
    if found is None:
        raise DataError(f"split {split!r} is no slice", where=where, expected=_SLICES, mend="correct the brackets")
    return found["name"].strip() or None, Slice(found["start"], found["stop"])


def split_of_file(path: Path, folder: Path) -> str | None:
    """The split that a file's name, or the folder it lies in, announces: `train-00000-of-00002.parquet`, `test/part.jsonl`."""
    for part in (path.name, *reversed(path.relative_to(folder).parts[:-1])):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLIT_NAMES.items():
            if any(word in names for word in words):
                return split
    return None


def split_of_name(name: str) -> str | None:
    """The split that the name of a single file announces, wherever it lies."""
    return split_of_file(Path(name), Path(name).parent)


def no_split(where: str, split: str | None, names: list[str]) -> DataError:
    """The error for a split that is not there."""
    if not names:
        return DataError(
            f"no split {split!r}: nothing here names a split, so all rows are 'train'",
            where=where,
            expected="no split, train, or a part such as train[:90%]" + did_you_mean(split or "", ["train"]),
            mend=f"leave the split out; {_HOLD_OUT}",
        )
    what = f"no split {split!r}: it has {', '.join(names)}" if split else f"several splits and none named 'train': {', '.join(names)}"
    mend = f"choose one{did_you_mean(split or '', names)}"
    if len(names) == 1 and split:
        mend += f"; {_HOLD_OUT}"
    return DataError(what, where=where, expected="the name of one of its splits", mend=mend)


def pick_split(splits: Iterable[str], split: str | None, where: str) -> str:
    """The split asked for (`dev` finds `validation`, say), else the only one, else `train`.

    Raises:
        DataError: there is no such split, or no way to choose.
    """
    names = list(splits)
    if split is None:
        wanted = names[0] if len(names) == 1 else "train"
    else:
        same = next((group for group in SPLIT_NAMES.values() if split in group), ())
        candidates = [split, *same, *SPLIT_NAMES.get(_STANDS_IN.get(split, ""), ())]
        wanted = next((name for name in candidates if name in names), split)
    if wanted not in names:
        raise no_split(where, split, names)
    return wanted


def require_only_split(split: str | None, where: str, announced: str | None = None) -> None:
    """Rows that come without splits are `train`, or what they announce themselves to be.

    Raises:
        DataError: another split is asked for.
    """
    if split in (None, "train"):
        return
    if announced is None:
        raise no_split(where, split, [])
    pick_split([announced], split, where)
