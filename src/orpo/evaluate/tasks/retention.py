"""What a model keeps of general language ability: perplexity on neutral text, and whether its answers stay of sound length and do not loop.

The text that ships (`neutral.txt`) was written for this project: short passages on everyday subjects, facts and small stories, in no one's
house style. Compare a model with itself before training; the absolute numbers say little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.data.types import TokenGroup, Where
from orpo.errors import DataError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_mean, estimate_means

if TYPE_CHECKING:
    from orpo.inference.generate import Answer

MAX_PASSAGE_TOKENS = 512
REPEATED_WORDS = 4
"""Repetition is counted in runs of so many words."""
LOOP_SHARE = 0.5
"""An answer loops if more than this share of its runs of words occurred before in it."""


@dataclass(frozen=True, slots=True)
class TextResult:
    """How well a model predicts a text. Intervals over passages.

    Attributes:
        perplexity: exp of the mean negative log-probability per token; its interval is that of the mean, carried over.
        nll: nats per token.
        bits_per_byte: the same per byte of text: comparable between tokenizers.
        nll_by_passage: summed nats and tokens of each passage, for comparisons.
    """

    num_passages: int
    num_tokens: int
    perplexity: Estimate
    nll: Estimate
    bits_per_byte: float
    nll_by_passage: tuple[tuple[float, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "num_passages": self.num_passages,
            "num_tokens": self.num_tokens,
            "perplexity": self.perplexity.to_dict(),
            "nll": self.nll.to_dict(),
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """Length and repetition of answers. Intervals over prompts.

    Attributes:
        mean_tokens: generated tokens.
        cut: share of answers that did not end by themselves.
        empty: share of answers without a visible character.
        repetition: mean share of runs of four words that occurred before in the same answer.
        loops: share of answers in which most runs did.
    """

    num_answers: int
    mean_tokens: Estimate
    cut: Estimate
    empty: Estimate
    repetition: Estimate
    loops: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = ("mean_tokens", "cut", "empty", "repetition", "loops")
        return {"num_answers": self.num_answers, **{name: getattr(self, name).to_dict() for name in names}}


def passage_groups(tokenizer: Any, passages: Sequence[str], max_tokens: int = MAX_PASSAGE_TOKENS) -> list[TokenGroup]:
    """Passages as the engine takes them: the first token is given (the tokenizer's own beginning, where it has one), the rest is scored.

    Longer passages are scored in pieces.
    """
    groups = []
    for number, passage in enumerate(passages):
        ids = np.asarray(tokenizer.encode(passage), dtype=np.int32)
        for start in range(0, len(ids) - 1, max_tokens):
            piece = ids[start : start + max_tokens + 1]
            groups.append(TokenGroup(piece[:1], (piece[1:],), (), (False,), Where("neutral text", number)))
    return groups


def summarise_text(passages: Sequence[str], groups: Sequence[TokenGroup], scores: Sequence[np.ndarray], *, seed: int = 0) -> TextResult:
    """Perplexity from the scores (`score_groups`) of `passage_groups`."""
    sums = np.zeros((len(passages), 2))
    for group, (logp,) in zip(groups, scores, strict=True):
        count = len(group.response_ids[0])
        sums[group.where.row] += (-logp * count, count)
    used = sums[sums[:, 1] > 0]
    if not len(used):
        raise DataError("the passages are too short to be scored", where="neutral text", expected="passages of at least two tokens")
    nll = _ratio(used, seed)
    num_bytes = sum(len(passage.encode()) for passage, (_, count) in zip(passages, sums, strict=True) if count)
    return TextResult(
        num_passages=len(used),
        num_tokens=int(used[:, 1].sum()),
        perplexity=Estimate(*(math.exp(min(value, 700.0)) for value in (nll.value, nll.low, nll.high))),
        nll=nll,
        bits_per_byte=float(used[:, 0].sum() / math.log(2) / num_bytes),
        nll_by_passage=tuple((float(total), int(count)) for total, count in sums),
    )


def text_difference(before: TextResult, after: TextResult, *, seed: int = 0) -> Estimate:
    """Change of nats per token, passage by passage. Both results are of the same passages and tokenizer.

    Raises:
        UserError: they are not.
    """
    counts = [count for _, count in before.nll_by_passage]
    if counts != [count for _, count in after.nll_by_passage]:
        raise UserError("the two models split the text into other tokens", where="retention", mend="compare bits per byte instead")
    change = np.array(
        [(new - old, count) for (old, count), (new, _) in zip(before.nll_by_passage, after.nll_by_passage, strict=True) if count]
    )
    return _ratio(change, seed)


def _ratio(sums: np.ndarray, seed: int) -> Estimate:
    """Total of the first column over that of the second, passages drawn with replacement."""
    share = sums[:, 0].sum() / sums[:, 1].sum()
    rows = np.repeat(np.arange(len(sums)), sums[:, 1].astype(int))
    found = estimate_means((sums[:, 0] / sums[:, 1])[rows][:, None], rows.tolist(), seed=seed)[0]
    return Estimate(float(share), found.low, found.high)


def shape_of_answers(answers: Sequence[Answer], *, seed: int = 0) -> AnswerShape:
    """Length and repetition of answers."""
    repeated = [repetition(answer.text) for answer in answers]
    columns = np.array(
        [
            (answer.num_tokens, answer.finish != "stop", not answer.text.strip(), share, share > LOOP_SHARE)
            for answer, share in zip(answers, repeated, strict=True)
        ],
        dtype=np.float64,
    )
    return AnswerShape(len(answers), *estimate_means(columns, range(len(answers)), seed=seed))


def repetition(text: str) -> float:
    """Share of runs of four words that occurred before in the text: 0 for no repetition, near 1 for a loop."""
    words = text.split()
    runs = [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mean_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean change, answer by answer."""
    return estimate_mean([new - old for old, new in zip(before, after, strict=True)], seed=seed)
