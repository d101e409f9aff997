"""What pairs that were just made are worth: how they cover the prompts, and what of their scores is length alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WORRYING_SHARE = 0.65
"""So many of the pairs would come out the same way round if length alone decided: then the text says what that would do."""


@dataclass(frozen=True, slots=True)
class Lookback:
    """Length against score.

    Attributes:
        num_prompts, num_covered: asked, and those with a pair.
        longer: share of pairs whose chosen answer is the longer one; None without pairs of different length.
        chosen_chars, rejected_chars: mean lengths.
        correlation: of score and length within prompts (mean over prompts where both differ); None where there is none.
        distinct: mean share of different answers among a prompt's samples.
    """

    num_prompts: int
    num_covered: int
    num_pairs: int
    longer: float | None
    chosen_chars: float
    rejected_chars: float
    correlation: float | None
    distinct: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"coverage     {self.num_covered} of {self.num_prompts} prompts have a pair; {self.distinct:.0%} of the answers differ"
        if self.longer is None:
            return
        said = f"lengths      the chosen answer is the longer one in {self.longer:.0%} of the pairs"
        said += f" (mean {self.chosen_chars:,.0f} against {self.rejected_chars:,.0f} characters)"
        if self.correlation is not None:
            said += f"; score and length within a prompt correlate by {self.correlation:+.2f}"
        yield said
        share = max(self.longer, 1 - self.longer)
        if share >= WORRYING_SHARE and self.num_pairs >= 10:
            way, cure = ("longer", "-") if self.longer > 0.5 else ("shorter", "")
            yield (
                f"             A scorer that only likes {way} answers would have made {share:.0%} of these pairs. If yours does,"
                f" training will make answers {way} and call it better: bound it (--max_length_ratio 1.5), weigh it"
                f" (--length --weights length={cure}0.01), or see that {way} answers are really the better ones"
            )


def look_back(pairs: Sequence[tuple[str, str]], scored: Sequence[Sequence[tuple[str, float | None]]], num_covered: int) -> Lookback:
    """Length against score.

    Args:
        pairs: (chosen, rejected) texts.
        scored: per prompt, (text, score) of every answer.
        num_covered: prompts with a pair.
    """
    lengths = [(len(chosen), len(rejected)) for chosen, rejected in pairs]
    different = [(one, other) for one, other in lengths if one != other]
    correlations = [
        value for answers in scored if (value := _correlation([(len(text), score) for text, score in answers if score is not None]))
    ]
    shares = [len({text.strip() for text, _ in answers}) / len(answers) for answers in scored if answers]
    return Lookback(
        num_prompts=len(scored),
        num_covered=num_covered,
        num_pairs=len(pairs),
        longer=sum(one > other for one, other in different) / len(different) if different else None,
        chosen_chars=_mean([one for one, _ in lengths]),
        rejected_chars=_mean([other for _, other in lengths]),
        correlation=_mean(correlations) if correlations else None,
        distinct=_mean(shares),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _correlation(points: Sequence[tuple[float, float]]) -> float | None:
    if len(points) < 3:
        return None
    mean_x, mean_y = (_mean([point[axis] for point in points]) for axis in (0, 1))
    spread_x, spread_y = (math.sqrt(sum((point[axis] - mean) ** 2 for point in points)) for axis, mean in ((0, mean_x), (1, mean_y)))
    if not spread_x or not spread_y:
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / (spread_x * spread_y)


def audit_lines(path: Path, places: int = 2) -> tuple[list[str], dict[str, Any] | None]:
    """What `orpo audit` says of the file, in lines and as facts; a word where its packages are not installed."""
    from orpo.audit import run_audit
    from orpo.errors import UserError

    try:
        audit = run_audit(str(path))
    except UserError as error:
        return [f"audit        not done: {error.what}" + (f" ({error.mend})" if error.mend else "")], None
    return list(audit.lines(places)), {"num_usable": audit.num_usable, "findings": [finding.code for finding in audit.findings]}
