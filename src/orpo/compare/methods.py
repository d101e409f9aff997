"""The methods that a comparison knows: an objective, or two of them in turn. What is tuned of each the registry of objectives says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orpo.config.objectives import find, known
from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup


@dataclass(frozen=True, slots=True)
class Method:
    """One way from preference pairs to a tuned model.

    Attributes:
        name: as on the command line: its objectives, joined by "+".
        label: for people.
        stages: names of objectives, in order; each stage starts from the weights of the one before.
        strength_name: key of the last stage's option that is tuned; None where there is none.
        strengths: its grid where the user names none; published values of each method.
        sweep: its values on the map of stability; empty where none is drawn.
    """

    name: str
    label: str
    stages: tuple[str, ...]
    strength_name: str | None = None
    strengths: tuple[float, ...] = ()
    sweep: tuple[float, ...] = ()


DEFAULT_METHODS = ("sft", "sft+dpo", "simpo", "orpo")


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        UserError: an objective in it is unknown, or there are more than two.
    """
    stages = tuple(name.split("+"))
    kinds = [find(stage) for stage in stages]
    if len(kinds) > 2:
        raise UserError(f"{name} has {len(kinds)} stages", where="--methods", expected="at most two")
    last = kinds[-1]
    label = " + ".join(kind.label for kind in kinds)
    if last.strength is None:
        return Method(name, label, stages)
    default = next(option.default for option in last.options if option.field == last.strength)
    return Method(name, label, stages, last.key_of(last.strength), last.strengths or (default,), last.sweep)


def find_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name, in the order given.

    Raises:
        UserError: a name is unknown, given twice, or there is none.
    """
    expected = f"some of {','.join(known())}, or two of them in turn, such as sft+dpo; each once"
    if not names or len(set(names)) < len(names):
        raise UserError("one is named twice" if names else "none is named", where="--methods", expected=expected)
    try:
        return [method_of(name) for name in names]
    except UserError as error:
        raise UserError(error.what, where="--methods", expected=expected, mend=error.mend) from error


def stage_rows(stage: str, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """What a stage computes of each row: SFT needs no rejected answer, and is not made to pay for one.

    A row with several pairs stays whole: its answers weigh as often as they win, in SFT as in ORPO.
    """
    if find(stage).needs_rejected:
        return list(groups)
    return [_chosen_only(group) if len(group.pairs) == 1 else group for group in groups]


def _chosen_only(group: TokenGroup) -> TokenGroup:
    chosen = group.pairs[0][0]
    changes: dict[str, Any] = {"response_ids": (group.response_ids[chosen],), "is_ended": (group.is_ended[chosen],), "pairs": ()}
    return replace(group, **changes)
