"""How good a model's answers to held-out prompts are, by the same sampling and the same scorers that make its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo.errors import UserError
from orpo.evaluate.bootstrap import estimate_mean
from orpo.evaluate.cache import Cache
from orpo.inference.ready import Loading
from orpo.onpolicy.answering import AskedGroup, Progress, Tell, draw_locally
from orpo.onpolicy.asked import Asked
from orpo.onpolicy.options import OnPolicyOptions
from orpo.onpolicy.scorers import score_all


@dataclass(frozen=True)
class HeldOutScore:
    """What a model's answers are worth.

    Attributes:
        value, low, high: mean score over prompts, with an interval over them.
        num_prompts, num_answers, num_unscored: how many.
        distinct: mean share of different answers to a prompt; None with one answer each.
        chars: mean length.
        cut: share of answers cut at `max_new_tokens`.
        by_prompt: mean score of each prompt, None where no answer was scored.
    """

    value: float
    low: float | None
    high: float | None
    num_prompts: int
    num_answers: int
    num_unscored: int
    distinct: float | None
    chars: float
    cut: float
    by_prompt: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def score_held_out(
    asked: Sequence[Asked], model: str, options: OnPolicyOptions, work: Path, loading: Loading, tell: Tell, progress: Progress
) -> HeldOutScore:
    """Sample answers of a model to prompts that it is not trained on, and score them.

    Args:
        work: folder of the caches.

    Raises:
        UserError: as when pairs are made.
    """
    groups = [AskedGroup(one) for one in asked]
    draw_locally(model, groups, options.draws, Cache(work / "answers.jsonl"), loading, tell, progress)
    scoring = score_all(options.scorers(model, loading), options.weights or {}, groups, Cache(work / "scores.jsonl"), progress)
    by_prompt = tuple(_mean([score for score in scores if score is not None]) for scores in scoring.totals)
    known = [score for score in by_prompt if score is not None]
    answers = [one for group in groups for one in group.attempts]
    shares = [len({one.text.strip() for one in group.attempts}) / len(group.attempts) for group in groups if len(group.attempts) > 1]
    if not known:
        told = "; ".join(f"{name}: {reasons.most_common(1)[0][0]}" for name, reasons in scoring.failures.items())
        raise UserError(
            f"no answer to a held-out prompt got a score ({told or 'none was given'})", where="on_policy", mend="mend the scorer"
        )
    estimate = estimate_mean(known)
    return HeldOutScore(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        num_prompts=len(groups),
        num_answers=len(answers),
        num_unscored=sum(score is None for scores in scoring.totals for score in scores),
        distinct=_mean(shares),
        chars=_mean([float(len(one.text)) for one in answers]) or 0.0,
        cut=_mean([float(one.is_cut) for one in answers]) or 0.0,
        by_prompt=by_prompt,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
