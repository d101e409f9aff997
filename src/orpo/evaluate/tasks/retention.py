"""What a model keeps of general language ability: perplexity on neutral text, and whether its answers stay of sound length and do not loop.

The text that ships (`neutral.txt`) was written for this project: short passages on everyday subjects, facts and small stories, in no one's
house style. Compare a model with itself before training; the absolute numbers say little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.data.types import TokenGroup, Where
from orpo.errors import DataError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_mean, estimate_means, estimate_share, estimate_share_change
from orpo.evaluate.logprobs import means_of
from orpo.evaluate.prompts import NEUTRAL_PROMPTS, NEUTRAL_TEXT, read_passages
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import interval
from orpo.report.sections import Cell, Row, Statement, Table, estimate, excludes_zero, power, show
from orpo.report.shown import AnswerColumns, Score, Shown

if TYPE_CHECKING:
    from orpo.evaluate.session import Session
    from orpo.inference.generate import Answer
    from orpo.inference.ready import Subject

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
    means = estimate_means(columns, range(len(answers)), seed=seed)
    is_share = (False, True, True, False, True)
    shares = [
        estimate_share(column, seed=seed) if counts else mean for column, counts, mean in zip(columns.T, is_share, means, strict=True)
    ]
    return AnswerShape(len(answers), *shares)


def repetition(text: str) -> float:
    """Share of runs of four words that occurred before in the text: 0 for no repetition, near 1 for a loop."""
    words = text.split()
    runs = [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mean_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean change, answer by answer."""
    return estimate_mean([new - old for old, new in zip(before, after, strict=True)], seed=seed)


# ---- the task --------------------------------------------------------------------------------------------------------------------------

COLLAPSED_SHARE = 0.2
"""From this share of looping or empty answers on a rise that is clear of zero is a collapse."""
COLLAPSED_REPETITION = 0.3
_SHAPE = (
    ("mean_tokens", "tokens of an answer", ".1f"),
    ("cut", "answers cut at the limit", ".1%"),
    ("empty", "empty answers", ".1%"),
    ("repetition", "repeated runs of four words", ".1%"),
    ("loops", "answers that loop", ".1%"),
)


@register
class RetentionTask(Task):
    """Perplexity on neutral text and the shape of answers, before and after."""

    name = "retention"
    help = "perplexity on neutral text; length, repetition and loops of answers"
    asks_judge = False
    options = (TaskOption("text", "neutral text, passages parted by blank lines (one that ships)", Path),)

    def __init__(self) -> None:
        self._passages: list[str] = []
        self._prompts: list[str] = []
        self._texts: dict[str, TextResult] = {}
        self._answers: dict[str, list[Answer]] = {}

    def prepare(self, session: Session) -> tuple[str, ...]:
        self._passages = read_passages(session.options.text or NEUTRAL_TEXT)
        self._prompts = read_passages(NEUTRAL_PROMPTS)[: session.options.limit]
        return session.sides

    def measure(self, session: Session, which: str, subject: Subject) -> None:
        groups = passage_groups(subject.tokenizer, self._passages)
        scores = means_of(session.logps(groups, "neutral text", which))
        self._texts[which] = summarise_text(self._passages, groups, scores, seed=session.options.seed)
        self._answers[which] = session.answers(self._prompts, session.sampling(128), which)

    def run(self, session: Session) -> Record:
        options, answers = session.options, self._answers
        if not self._texts:
            raise UserError("this needs a model", where="retention", expected="a run or a model")
        found: Record = {
            "text": str(options.text) if options.text else "neutral.txt",
            "max_new_tokens": session.sampling(128).max_new_tokens,
            **{
                which: {**self._texts[which].to_dict(), "answers": shape_of_answers(answers[which], seed=options.seed).to_dict()}
                for which in self._texts
            },
            "shown": [
                {"prompt": prompt, **{which: answers[which][row].text for which in answers}} for row, prompt in enumerate(self._prompts)
            ],
        }
        if "against" in self._texts:
            found["change"] = self._change(options.seed)
        return found

    def _change(self, seed: int) -> Record:
        found: Record = {}
        try:
            found["nll"] = text_difference(self._texts["against"], self._texts["model"], seed=seed).to_dict()
        except UserError as error:
            found["note"] = str(error)
        before, after = (self._answers[which] for which in ("against", "model"))
        found["mean_tokens"] = mean_change(*([one.num_tokens for one in side] for side in (before, after)), seed=seed).to_dict()
        repeated = [[repetition(one.text) for one in side] for side in (before, after)]
        found["repetition"] = mean_change(*repeated, seed=seed).to_dict()
        shares = {
            "cut": [[float(one.finish != "stop") for one in side] for side in (before, after)],
            "empty": [[float(not one.text.strip()) for one in side] for side in (before, after)],
            "loops": [[float(share > LOOP_SHARE) for share in side] for side in repeated],
        }
        return found | {name: estimate_share_change(*both, seed=seed).to_dict() for name, both in shares.items()}

    def lines(self, result: Record) -> Iterator[str]:
        yield f"text: {result['text']}; answers of at most {result['max_new_tokens']} tokens"
        for which, label in (("against", "before"), ("model", "after" if "against" in result else "model")):
            if which in result:
                one = result[which]
                shape = {name: value["value"] for name, value in one["answers"].items() if isinstance(value, dict)}
                yield f"{label:<7} perplexity {interval(one['perplexity'], '.2f')}, {one['bits_per_byte']:.3f} bits per byte"
                lengths = f"answers of {shape['mean_tokens']:.0f} tokens, {shape['cut']:.0%} cut"
                loops = interval(one["answers"]["loops"], ".0%")
                yield f"        {lengths}, repetition {shape['repetition']:.1%}, loops {loops}"
        change = result.get("change", {})
        if "nll" in change:
            yield f"change  {interval(change['nll'], '+.4f')} nats per token"
        if said := _power(result):
            yield f"        {said}"

    def show(self, result: Record) -> Shown:
        before, after, change = result.get("against", {}), result["model"], result.get("change", {})
        shown = Shown("What was kept: neutral text, and the shape of answers", "Retention")
        shown.statements = [*collapses(result)]
        if "nll" in change:
            sign = excludes_zero(change["nll"])
            said = {
                1: "The model predicts neutral text worse than before, clear of zero: it forgot something.",
                0: "No forgetting that could be told from chance on neutral text.",
                -1: "The model predicts neutral text better than before, clear of zero.",
            }
            # Text that loops is likely text: where answers have collapsed, a better prediction is no merit.
            tone = "bad" if sign > 0 else "" if shown.statements else "good"
            shown.statements.append(Statement(said[sign], tone))
        rows = [
            _three(words, before.get(key), after[key], change.get(key), style, is_better=-1)
            for key, words, style in (("perplexity", "perplexity", ".2f"), ("nll", "nats per token", ".3f"))
        ]
        rows.append([Cell("bits per byte"), Cell(show(before.get("bits_per_byte"))), Cell(show(after["bits_per_byte"])), Cell("")])
        for key, words, style in _SHAPE:
            old = before.get("answers", {}).get(key)
            rows.append(_three(words, old, after["answers"][key], change.get(key), style, is_better=0))
        shown.scores = [Score("perplexity of neutral text", after["perplexity"], ".2f"), Score("bits per byte", after["bits_per_byte"])]
        shown.scores += [Score(words, after["answers"][key], style) for key, words, style in _SHAPE]
        note = _power(result)
        shown.tables.append(Table(("", "before", "after", "change"), rows, note=f"{note}." if note else ""))
        shown.answers = AnswerColumns("shown", (("against", "before"), ("model", "after")))
        return shown


def _power(result: Record) -> str:
    loops = result.get("change", {}).get("loops")
    return power(loops, "a change of the looping answers", num=result["model"]["answers"]["num_answers"], of="answers")


def collapses(result: Record) -> Iterator[Statement]:
    """What nobody may overlook, whatever the other numbers say: answers that loop, repeat themselves, or are empty."""
    after, before, change = result["model"]["answers"], result.get("against", {}).get("answers"), result.get("change", {})
    for name, words, least in (
        ("loops", "answers go round in circles", COLLAPSED_SHARE),
        ("repetition", "of all runs of four words stood in the same answer before", COLLAPSED_REPETITION),
        ("empty", "answers are empty", COLLAPSED_SHARE),
    ):
        new = after[name]["value"]
        if before is None:
            is_collapse, said = new >= 0.5, f"{new:.0%}"
        else:
            is_collapse = new >= least and excludes_zero(change.get(name)) > 0
            said = f"{new:.0%}, where it was {before[name]['value']:.0%} before training,"
        if is_collapse:
            share = f"{said} of the {words}" if name != "repetition" else f"{said} {words}"
            yield Statement(f"The answers have collapsed: {share}. Judge no other number before this one.", "warn")


def _three(words: str, before: Any, after: Any, change: Any, style: str, *, is_better: int) -> Row:
    tone = {1: "good", -1: "bad"}.get(excludes_zero(change) * is_better, "")
    moved = estimate(change, f"+{style}p" if style.endswith("%") else f"+{style}", tone=tone) if change is not None else Cell("")
    return [Cell(words), estimate(before, style), estimate(after, style), moved]
