"""The registry: what an objective is called, which options it has, and what the metrics of the log mean for it.

Configuration, guards, log, report and comparison ask here, so that an objective is one class and one `register` line, wherever it lives.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from orpo.errors import UserError
from orpo.objective.equations import Objective


@dataclass(frozen=True, slots=True)
class Option:
    """An option of an objective: a field of its class, and a key of the configuration.

    Attributes:
        key: in YAML, flags and `ORPOConfig`: the field's name behind the objective's, `simpo_gamma`.
        field: in the class.
        hint, default: type annotation and default of the field.
        help: one line.
        lowest, is_lowest_allowed, highest: its range; None for no bound.
        mend: what to say to a value out of range.

    Example:
        >>> from orpo.objective import KINDS
        >>> [(option.key, option.default) for option in KINDS["orpo"].options]
        [('orpo_alpha', 0.1), ('orpo_beta', 1.0)]
    """

    key: str
    field: str
    hint: Any
    default: Any
    help: str = ""
    lowest: float | None = None
    is_lowest_allowed: bool = True
    highest: float | None = None
    mend: str | None = None


@dataclass(frozen=True)
class ObjectiveKind:
    """What is known of an objective beside its equation. Made by `register`.

    Attributes:
        name, label: in a configuration, and for people.
        cls: makes the objective; a dataclass whose fields are the options.
        formula: the loss in words, with `{nll}` for the next-token loss and `{name}` for a field or property of the objective.
        preference: what the preference term is called; None where there is none.
        has_nll: whether the next-token loss is a part, as it is of ORPO; else the metric `nll_loss` is measured and not trained.
        reward: the field that turns a mean log-probability into the implicit reward (`rewards/…` in the log); None: none is logged.
        strength: the field that is tuned beside the learning rate; None for none.
        strengths, sweep: values of it that `orpo compare` tries, and those of its map of stability.
        needs_reference: whether every response needs its log-probability under frozen weights.
        needs_rejected: whether rejected answers take part; SFT is not made to pay for them.
        about: a clause for the model card.
        source: address of the paper.

    Example:
        >>> from orpo.objective import KINDS
        >>> kind = KINDS["simpo"]
        >>> kind.describe(kind.build({"simpo_beta": 4.0}))
        'SimPO (simpo_beta 4)'
    """

    name: str
    label: str
    cls: type
    formula: str
    preference: str | None = "preference term"
    has_nll: bool = False
    reward: str | None = None
    strength: str | None = None
    strengths: tuple[float, ...] = ()
    sweep: tuple[float, ...] = ()
    needs_reference: bool = False
    needs_rejected: bool = True
    about: str = ""
    source: str = ""

    @property
    def options(self) -> tuple[Option, ...]:
        """In the order of the class."""
        hints = typing.get_type_hints(self.cls)
        return tuple(
            Option(self.key_of(item.name), item.name, hints[item.name], item.default, **item.metadata)
            for item in dataclasses.fields(self.cls)
        )

    @property
    def has_two_terms(self) -> bool:
        """Whether next-token loss and preference term share the gradient, so that the share of each means something."""
        return self.has_nll and self.preference is not None

    def key_of(self, field: str) -> str:
        """The key of a field: its name behind the objective's, where it does not begin with it already."""
        return field if field.startswith(f"{self.name}_") else f"{self.name}_{field}"

    def build(self, values: Mapping[str, Any]) -> Objective:
        """The objective with the options among `values`, by key; what is not there has its default, other keys are passed over."""
        made: Objective = self.cls(**{option.field: values[option.key] for option in self.options if option.key in values})
        return made

    def describe(self, objective: Objective) -> str:
        """`ORPO (orpo_alpha 0.1, orpo_beta 1)`; what is unset follows from the rest."""
        given = {option.key: getattr(objective, option.field) for option in self.options}
        options = [f"{key} {_shown(value)}" for key, value in given.items() if value is not None]
        return f"{self.label} ({', '.join(options)})" if options else self.label

    def facts(self, objective: Objective, nll: str = "next-token loss") -> dict[str, Any]:
        """Plain values for run.json, from which a report draws an objective that it has never heard of."""
        fields = {option.field: getattr(objective, option.field) for option in self.options}
        return {
            "name": self.name,
            "label": self.label,
            "options": {option.key: fields[option.field] for option in self.options},
            "formula": self.formula.format_map(_Words(objective, nll)),
            "preference": self.preference,
            "has_nll": self.has_nll,
            "about": self.about,
            "source": self.source,
        }

    def reward_scale(self, objective: Objective) -> float | None:
        """What the mean log-probability is multiplied by to give the implicit reward; None where there is no such thing."""
        return None if self.reward is None else float(getattr(objective, self.reward))


class _Words(dict[str, str]):
    """What stands for the names in a formula."""

    def __init__(self, objective: Objective, nll: str) -> None:
        super().__init__(nll=nll)
        self.objective = objective

    def __missing__(self, name: str) -> str:
        return _shown(getattr(self.objective, name))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


KINDS: dict[str, ObjectiveKind] = {}
"""Every objective by name, in the order of registration."""


def option(
    default: Any,
    *,
    help: str = "",
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    mend: str | None = None,
) -> Any:
    """A field of an objective that is checked and told as an option of the configuration.

    Args:
        default: every option has one.
        help: one line for the list of options.
        at_least, more_than, at_most: its range; at most one of the first two.
        mend: what to say to a value out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> from orpo.objective import option
        >>> @dataclass(frozen=True)
        ... class Hinge:
        ...     size: float = option(1.0, help="Margin that is asked for.", more_than=0)
        >>> Hinge()
        Hinge(size=1.0)
    """
    lowest = at_least if more_than is None else more_than
    metadata = {"help": help, "lowest": lowest, "is_lowest_allowed": more_than is None, "highest": at_most, "mend": mend}
    return dataclasses.field(default=default, metadata=metadata)


_Class = typing.TypeVar("_Class", bound=type)


def register(name: str, **about: Any) -> Callable[[_Class], _Class]:
    """Make an objective known by a name: to `objective:` in YAML and flags, to `ORPOConfig`, and to `orpo compare --methods`.

    Args:
        name: lower-case letters, digits and `_`.
        about: attributes of `ObjectiveKind`; without a label the class's name is one, without a formula the class's first line.

    Returns:
        A decorator for a dataclass with `__call__(logp_N, index) -> Terms`; each of its fields needs a default (`option`).

    Raises:
        UserError: the name is taken or malformed, or the class is none that can be configured.

    Example:
        >>> import torch.nn.functional as F
        >>> from orpo.objective import KINDS, mean_logp, option, register
        >>> @register("margin", strength="size")
        ... @dataclass(frozen=True)
        ... class Margin:
        ...     "Hinge on the difference of mean log-probabilities."
        ...     size: float = option(1.0, more_than=0)
        ...     def __call__(self, logp_N, index):
        ...         logp_R = mean_logp(logp_N, index)
        ...         gap_B = logp_R[index.chosen_B] - logp_R[index.rejected_B]
        ...         return {"preference": F.relu(self.size - gap_B).sum() / (index.num_pairs or 1.0)}
        >>> KINDS.pop("margin").build({"margin_size": 2.0})
        Margin(size=2.0)
    """

    def decorate(cls: _Class) -> _Class:
        first_line = (cls.__doc__ or "").strip().partition("\n")[0]
        formula = first_line.replace("{", "{{").replace("}", "}}")
        kind = ObjectiveKind(**{"name": name, "label": cls.__name__, "cls": cls, "formula": formula, **about})
        _check_kind(kind)
        KINDS[name] = kind
        return cls

    return decorate


def _check_kind(kind: ObjectiveKind) -> None:
    where = f"orpo.objective.register({kind.name!r})"
    if not re.fullmatch("[a-z][a-z0-9_]*", kind.name):
        raise UserError("the name is malformed", where=where, expected="lower-case letters, digits and _")
    other = KINDS.get(kind.name)
    if other is not None and (other.cls.__module__, other.cls.__qualname__) != (kind.cls.__module__, kind.cls.__qualname__):
        raise UserError(f"the name is taken by {other.cls.__module__}.{other.cls.__qualname__}", where=where, mend="choose another")
    if not dataclasses.is_dataclass(kind.cls) or not callable(getattr(kind.cls, "__call__", None)):  # noqa: B004  (of its objects)
        raise UserError(f"{kind.cls.__name__} is no dataclass with __call__", where=where, mend="@dataclass(frozen=True) below @register")
    fields = {item.name: item for item in dataclasses.fields(kind.cls)}
    if bare := [name for name, item in fields.items() if item.default is MISSING]:
        raise UserError(f"{bare[0]} has no default", where=where, mend=f"{bare[0]}: float = option(1.0, help=…)")
    for role in ("strength", "reward"):
        if getattr(kind, role) not in (None, *fields):
            raise UserError(f"{role} is {getattr(kind, role)!r}", where=where, expected=f"a field: {', '.join(fields) or 'there is none'}")


def kind_of(objective: Objective) -> ObjectiveKind:
    """What is registered for an objective, or for a class that it extends; of any other only the name is known.

    Example:
        >>> from orpo.objective import ORPO, kind_of
        >>> kind_of(ORPO()).label
        'ORPO'
    """
    for cls in type(objective).__mro__:
        for kind in KINDS.values():
            if kind.cls is cls:
                return kind
    name = getattr(objective, "__name__", type(objective).__name__)
    return ObjectiveKind(name.lower(), name, _Unknown, formula=name.replace("{", "{{").replace("}", "}}"))


@dataclass(frozen=True, slots=True)
class _Unknown:
    """An objective that was handed over in Python and is not registered: it has no options to speak of."""
