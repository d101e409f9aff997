"""Rows of a comparison: one split by prompt into training, validation and test, the same for every method, stage and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.run.data import Tell, prepare_data, split_by_prompt

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.data.types import TokenGroup
    from orpo.run.config import RunConfig
    from orpo.run.data import RunData


@dataclass(frozen=True, slots=True)
class Split:
    """How rows are parted. Which prompt goes where depends on the prompt alone.

    Attributes:
        test_fraction: share of the prompts for the test, where the configuration holds nothing out itself.
        validation_fraction: share of the remaining prompts, on which grids are decided.
        max_train_rows, max_eval_rows: most rows of training, and of validation and of test each; None for all.
        tune_rows: most rows of a trial; None trains trials on all training rows, and a chosen trial then is its seed's run.
    """

    test_fraction: float = 0.2
    validation_fraction: float = 0.15
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    tune_rows: int | None = None


@dataclass(frozen=True)
class ComparisonData:
    """Rows of the three parts, and what made them."""

    train: list[TokenGroup]
    validation: list[TokenGroup]
    test: list[TokenGroup]
    run: RunData

    def for_trials(self, tune_rows: int | None) -> list[TokenGroup]:
        """The training rows of a trial."""
        return first_by_prompt(self.train, tune_rows)

    def to_dict(self) -> dict[str, Any]:
        """For comparison.json."""
        from orpo.data.dataset import fingerprint

        return {
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "num_test": len(self.test),
            "fingerprint": fingerprint([*self.train, *self.validation, *self.test]),
            "date": self.run.encoder.describe().get("date"),
            "dropped": self.run.train_report.to_dict().get("dropped", {}),
        }


def load_comparison_data(config: RunConfig, args: ORPOConfig, split: Split, tell: Tell, *, date: str | None = None) -> ComparisonData:
    """Read, tokenise and part the rows of a configuration.

    Args:
        date: what a template that asks for today gets, the same in every stage; None takes now.

    Raises:
        UserError: as `prepare_data`, or a part would be empty.
    """
    if args.streaming:
        raise UserError("methods are compared on the same rows, which a stream has not", where="streaming", mend="leave it out")
    run = prepare_data(config, args, tell, date=date)
    if run.held_out is None:
        train, test = split_by_prompt(run.known_rows, split.test_fraction)
    else:
        train, test = run.known_rows, run.held_out
    train, validation = split_by_prompt(train, split.validation_fraction, salt=b"validation")
    return ComparisonData(
        first_by_prompt(train, split.max_train_rows),
        first_by_prompt(_with_pairs(validation), split.max_eval_rows),
        first_by_prompt(_with_pairs(test), split.max_eval_rows),
        run,
    )


def first_by_prompt(groups: Sequence[TokenGroup], number: int | None) -> list[TokenGroup]:
    """At most so many rows, picked by a hash of their ids, in their order: a sample that a new row disturbs by one at most."""
    if number is None or len(groups) <= number:
        return list(groups)

    def rank(row: int) -> bytes:
        ids = (groups[row].prompt_ids, *groups[row].response_ids)
        return hashlib.sha256(b"sample" + b"|".join(part.astype("<i4").tobytes() for part in ids)).digest()

    return [groups[row] for row in sorted(sorted(range(len(groups)), key=rank)[:number])]


def _with_pairs(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Without SFT-only rows, which no preference can be measured on."""
    return [group for group in groups if group.pairs]
