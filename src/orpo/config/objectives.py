"""The objectives as a configuration sees them: which there are, which keys their options are, and what is wrong with given values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from orpo.config.values import describe, did_you_mean, found, is_accepted
from orpo.errors import UserError
from orpo.objective import KINDS, Objective, ObjectiveKind, Option
from orpo.system.plugins import OBJECTIVES, load_installed


def known() -> dict[str, ObjectiveKind]:
    """Every objective by name: the package's own, those of installed packages, those of plugins loaded so far."""
    load_installed(OBJECTIVES)
    return KINDS


def option_keys() -> dict[str, Option]:
    """Key -> option, of every objective that is known."""
    return {option.key: option for kind in known().values() for option in _options(kind)}


# A class does not change, and reading its annotations anew for every key would take as long as all else.
_options = functools.cache(lambda kind: kind.options)


def find(name: str) -> ObjectiveKind:
    """The objective of this name.

    Raises:
        UserError: there is none, or its package could not be loaded.
    """
    if name in known():
        return KINDS[name]
    if name in (failed := load_installed(OBJECTIVES)):
        raise UserError(failed[name].what, where="objective", mend=failed[name].mend)
    mend = did_you_mean(name, KINDS) or "an objective of your own: plugins: [my_objective.py]"
    raise UserError(f"found {found(name)}", where="objective", expected=f"one of {', '.join(KINDS)}", mend=mend)


def build(name: str, values: Mapping[str, Any]) -> Objective:
    """The objective of this name with its options among `values`, by key."""
    return find(name).build(values)


def objective_problems(values: Mapping[str, Any]) -> list[UserError]:
    """What is wrong with the objective's name and with options, flat or in `objective_options`; those of other objectives too."""
    problems: list[UserError] = []
    if "objective" in values:
        try:
            find(values["objective"])
        except (UserError, TypeError) as error:
            problems.append(error if isinstance(error, UserError) else UserError(f"found {found(values['objective'])}", where="objective"))
    options = option_keys()
    nested = values.get("objective_options")
    for key in nested if isinstance(nested, dict) else ():
        if key not in options:
            mend = did_you_mean(key, options)
            problems.append(UserError(f"there is no option {key!r}", where="objective_options", expected=_listed(options), mend=mend))
    given = {**(nested if isinstance(nested, dict) else {}), **values}
    return problems + [problem for key, option in options.items() if key in given for problem in _option_problems(option, given[key])]


def _option_problems(option: Option, value: Any) -> list[UserError]:
    if not is_accepted(option.hint, value):
        return [UserError(f"found {found(value)}", where=option.key, expected=describe(option.hint))]
    return range_problem(option.key, value, option.lowest, option.is_lowest_allowed, option.highest, option.mend)


def range_problem(
    key: str, value: Any, lowest: float | None, is_lowest_allowed: bool, highest: float | None, mend: str | None = None
) -> list[UserError]:
    """A number outside of its range, as one problem; nothing for what is no number."""
    if value is None or isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return []
    is_high_enough = lowest is None or (value >= lowest if is_lowest_allowed else value > lowest)
    if math.isfinite(value) and is_high_enough and (highest is None or value <= highest):
        return []
    bounds = [] if lowest is None else [f"{'at least' if is_lowest_allowed else 'more than'} {lowest:g}"]
    bounds += [] if highest is None else [f"at most {highest:g}"]
    return [UserError(f"found {value}", where=key, expected=", ".join(["a finite number", *bounds]), mend=mend)]


def options_without_effect(name: str, given: Iterable[str]) -> list[str]:
    """A note for each option that was given and is another objective's."""
    if name not in known():
        return []  # told as an unknown objective
    own = [option.key for option in _options(KINDS[name])]
    whose = f", whose options are {', '.join(own)}" if own else ", which has no options"
    others = [key for key in given if key in option_keys() and key not in own]
    return [f"{key} has no effect: the objective is {name}{whose}" for key in others]


def needs_reference(name: str) -> list[UserError]:
    """One problem where an objective cannot be trained from a configuration, since nothing there gives it its reference."""
    if name not in known() or not KINDS[name].needs_reference:
        return []
    others = ", ".join(kind.name for kind in KINDS.values() if not kind.needs_reference)
    return [
        UserError(
            f"found {name!r}, which needs the log-probability of every answer under a frozen reference",
            where="objective",
            expected=f"an objective without a reference: {others}",
            mend=f"`orpo compare --methods sft+{name}` computes the reference once and trains from it; in Python, give ORPOTrainer token "
            "groups with reference_logp_sums",
        )
    ]


def _listed(options: Mapping[str, Option]) -> str:
    return f"some of {', '.join(options)}"


def describe_objectives() -> str:
    """Every objective with its loss at the defaults, and its options."""
    lines = []
    for kind in known().values():
        where = "; trained by `orpo compare` alone, which computes the reference" if kind.needs_reference else ""
        lines.append(f"  {kind.name:<10}{kind.facts(kind.build({}))['formula']}{where}")
        lines += [f"    --{option.key:<24}{option.help} ({_default(option)})" for option in _options(kind)]
    return "\n".join(lines)


def _default(option: Option) -> str:
    return "unset" if option.default is None else f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
