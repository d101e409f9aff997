"""The methods that a comparison knows: their stages, and the one strength that is tuned beside the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.data.types import TokenGroup
    from orpo.objective import Objective


@dataclass(frozen=True, slots=True)
class Method:
    """One way from preference pairs to a tuned model.

    Attributes:
        name: as on the command line.
        label: for people.
        stages: names of objectives, in order; each stage starts from the weights of the one before.
        strength_name: option of the last stage's objective that is tuned; None where there is none.
        strengths: its grid where the user names none; published values of each method.
        has_reference: whether the last stage needs log-probabilities under the weights that it starts from.
    """

    name: str
    label: str
    stages: tuple[str, ...]
    strength_name: str | None = None
    strengths: tuple[float, ...] = ()
    has_reference: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("sft", "SFT", ("sft",)),
        Method("sft+dpo", "SFT + DPO", ("sft", "dpo"), "beta", (0.05, 0.1), has_reference=True),
        Method("dpo", "DPO", ("dpo",), "beta", (0.05, 0.1), has_reference=True),
        Method("simpo", "SimPO", ("simpo",), "beta", (2.0, 10.0)),
        Method("orpo", "ORPO", ("orpo",), "orpo_alpha", (0.1, 1.0)),
    )
}
DEFAULT_METHODS = ("sft", "sft+dpo", "simpo", "orpo")
GAMMA_OVER_BETA = 0.5
"""SimPO's target margin follows its beta, as its authors tune it (arXiv 2405.14734, appendix on hyperparameters)."""


def find_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name, in the order given.

    Raises:
        UserError: a name is unknown, given twice, or there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) < len(names):
        found = f"found {', '.join(unknown)}" if unknown else "one is named twice" if names else "none is named"
        raise UserError(found, where="--methods", expected=f"some of {','.join(METHODS)}, each once")
    return [METHODS[name] for name in names]


def build_objective(stage: str, options: dict[str, float]) -> Objective:
    """The objective of a stage.

    Args:
        stage: name of the objective.
        options: `orpo_alpha` and `orpo_beta` for ORPO, `beta` for DPO and SimPO; others are passed over.
    """
    from orpo import objective

    if stage == "sft":
        return objective.SFT()
    if stage == "dpo":
        return objective.DPO(beta=options["beta"])
    if stage == "simpo":
        return objective.SimPO(beta=options["beta"], gamma=options["beta"] * GAMMA_OVER_BETA)
    return objective.ORPO(orpo_alpha=options["orpo_alpha"], orpo_beta=options.get("orpo_beta", 1.0))


def stage_rows(stage: str, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """What a stage computes of each row: SFT needs no rejected answer, and is not made to pay for one.

    A row with several pairs stays whole: its answers weigh as often as they win, in SFT as in ORPO.
    """
    if stage != "sft":
        return list(groups)
    return [_chosen_only(group) if len(group.pairs) == 1 else group for group in groups]


def _chosen_only(group: TokenGroup) -> TokenGroup:
    chosen = group.pairs[0][0]
    changes: dict[str, Any] = {"response_ids": (group.response_ids[chosen],), "is_ended": (group.is_ended[chosen],), "pairs": ()}
    return replace(group, **changes)
