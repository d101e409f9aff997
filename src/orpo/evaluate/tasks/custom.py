"""Two models' answers to your own prompts, side by side: which does a judge prefer?

Judges lean to the answer that they read first. So every pair is shown in both orders; a pair counts as won only where both agree, and as
a tie where they do not. A reward model scores each answer by itself and needs no order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_share
from orpo.evaluate.judging.judges import Conversation, Judge, Reply, ask_all, fill
from orpo.evaluate.judging.local import RewardModel, as_messages
from orpo.evaluate.judging.verdicts import read_choice
from orpo.evaluate.prompts import read_prompt_answers, read_prompts
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import gaps, interval, power_of_rate
from orpo.report.shown import AnswerColumns, Drawing, Score, Shown

if TYPE_CHECKING:
    from orpo.data.types import Text
    from orpo.evaluate.cache import Cache
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.session import Session
    from orpo.inference.ready import Subject

WIN, TIE, LOSS = 1.0, 0.5, 0.0
OUTCOMES = {WIN: "win", TIE: "tie", LOSS: "loss"}

SYSTEM_PROMPT = (
    "You compare two answers to the same request. Weigh whether each does what was asked, whether what it says is correct, and whether it "
    "is clear and complete. Length is no merit in itself, and neither is the place of an answer: A and B stand in random order. Give your "
    "reasons in a few sentences. Then end with your verdict on a line of its own: [[A]] if answer A is better, [[B]] if answer B is "
    "better, [[C]] if neither is."
)
QUESTION = (
    "Request:\n{request}\n\n--- Answer A ---\n{answer_a}\n--- End of answer A ---\n\n--- Answer B ---\n{answer_b}\n--- End of answer B ---"
)


@dataclass(frozen=True, slots=True)
class PairwiseResult:
    """How often the first model's answers won. Shares are over judged prompts, intervals over prompts.

    Attributes:
        win_rate: wins plus half the ties.
        wins, ties, losses: shares.
        num_inconsistent: prompts whose two orders gave opposite winners; counted as ties.
        first_place: share of decided verdicts for the answer shown first: 0.5 is no leaning. NaN for a reward model.
        num_malformed: replies without exactly one verdict. A prompt with one is not judged.
        num_unanswered: questions to the judge without a reply.
        outcomes: per prompt "win", "tie", "loss", or None where it was not judged.
    """

    num_prompts: int
    num_judged: int
    win_rate: Estimate
    wins: Estimate
    ties: Estimate
    losses: Estimate
    num_inconsistent: int
    first_place: float
    num_malformed: int
    num_unanswered: int
    outcomes: tuple[str | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        shares = {name: getattr(self, name).to_dict() for name in ("win_rate", "wins", "ties", "losses")}
        return {
            "num_prompts": self.num_prompts,
            "num_judged": self.num_judged,
            **shares,
            "num_inconsistent": self.num_inconsistent,
            "first_place": None if self.first_place != self.first_place else self.first_place,
            "num_malformed": self.num_malformed,
            "num_unanswered": self.num_unanswered,
            "outcomes": list(self.outcomes),
        }


def compare_answers(
    prompts: Sequence[Text],
    first: Sequence[str],
    second: Sequence[str],
    judge: Judge | RewardModel,
    cache: Cache,
    *,
    seed: int = 0,
    retry_malformed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PairwiseResult:
    """Judge the first model's answers against the second's.

    Raises:
        UserError: nothing could be judged.
        JudgeUnavailable: the judge stopped answering; what it said is kept in the cache.
    """
    if isinstance(judge, RewardModel):
        verdicts = _by_reward(prompts, first, second, judge, cache, progress)
    else:
        verdicts = _by_reading(prompts, first, second, judge, cache, retry_malformed, progress)
    points = [_points(verdict) for verdict in verdicts.pairs]
    judged = [point for point in points if point is not None]
    if not judged:
        raise UserError(
            f"no prompt could be judged: {verdicts.num_malformed} verdicts cannot be read, {verdicts.num_unanswered} are missing",
            where="judge",
            mend="look at the replies in eval/cache, or take another judge",
        )
    shares = [estimate_share([point == value for point in judged], seed=seed) for value in (WIN, TIE, LOSS)]
    decided = [choice for choice in verdicts.read_order if choice != "C"]
    return PairwiseResult(
        num_prompts=len(prompts),
        num_judged=len(judged),
        win_rate=estimate_share(judged, seed=seed),
        wins=shares[0],
        ties=shares[1],
        losses=shares[2],
        num_inconsistent=sum(pair in ((WIN, LOSS), (LOSS, WIN)) for pair in verdicts.pairs),
        first_place=decided.count("A") / len(decided) if decided else float("nan"),
        num_malformed=verdicts.num_malformed,
        num_unanswered=verdicts.num_unanswered,
        outcomes=tuple(None if point is None else OUTCOMES[point] for point in points),
    )


@dataclass(frozen=True, slots=True)
class _Verdicts:
    """Per prompt the points of the first model in each order, None for a verdict that is not there; and the verdicts as they were read."""

    pairs: list[tuple[float | None, float | None]]
    read_order: list[str]
    num_malformed: int
    num_unanswered: int


def _points(pair: tuple[float | None, float | None]) -> float | None:
    """Both orders as one outcome: a win needs both of them, anything mixed is a tie."""
    one, other = pair
    if one is None or other is None:
        return None
    return one if one == other else TIE


def _by_reading(
    prompts: Sequence[Text],
    first: Sequence[str],
    second: Sequence[str],
    judge: Judge,
    cache: Cache,
    retry_malformed: bool,
    progress: Callable[[int, int], None] | None,
) -> _Verdicts:
    conversations = [
        question(prompt, *answers)
        for prompt, one, other in zip(prompts, first, second, strict=True)
        for answers in ((one, other), (other, one))
    ]
    is_stale = _is_malformed if retry_malformed else None
    replies = ask_all(judge, conversations, cache, is_stale=is_stale, progress=progress).replies
    choices = [None if reply is None else read_choice(reply.text) for reply in replies]
    straight, swapped = {"A": WIN, "B": LOSS, "C": TIE}, {"A": LOSS, "B": WIN, "C": TIE}
    pairs = [
        (None if one is None else straight[one], None if other is None else swapped[other])
        for one, other in zip(choices[::2], choices[1::2], strict=True)
    ]
    return _Verdicts(
        pairs,
        [choice for choice in choices if choice is not None],
        sum(reply is not None and _is_malformed(reply) for reply in replies),
        sum(reply is None for reply in replies),
    )


def _by_reward(
    prompts: Sequence[Text],
    first: Sequence[str],
    second: Sequence[str],
    judge: RewardModel,
    cache: Cache,
    progress: Callable[[int, int], None] | None,
) -> _Verdicts:
    answers = [(prompt, answer) for prompt, *both in zip(prompts, first, second, strict=True) for answer in both]
    scores = judge.scores(answers, cache, progress=progress)
    points = [WIN if one > other else LOSS if one < other else TIE for one, other in zip(scores[::2], scores[1::2], strict=True)]
    return _Verdicts([(point, point) for point in points], [], 0, 0)


def _is_malformed(reply: Reply) -> bool:
    return read_choice(reply.text) is None


def question(prompt: Text, answer_a: str, answer_b: str) -> Conversation:
    """What the judge is shown."""
    values = {"request": as_text(prompt), "answer_a": answer_a, "answer_b": answer_b}
    return ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": fill(QUESTION, values)})


def as_text(prompt: Text) -> str:
    """A prompt for a judge to read: what a single user message says, or the conversation with its roles."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


# ---- the task --------------------------------------------------------------------------------------------------------------------------


@register
class CustomTask(Task):
    """Answers to your own prompts against another run's or model's, or given ones."""

    name = "custom"
    help = "your own prompts against another run or model, by a judge"
    options = (
        TaskOption("prompts", "own prompts, one per row, or a .txt with blank lines between them", Path),
        TaskOption("against_answers", "file with the other side's answers", Path),
    )
    takes_answers = True

    def __init__(self) -> None:
        self._prompts: list[Text] = []
        self._answers: dict[str, list[str]] = {}

    @classmethod
    def check(cls, options: EvalOptions) -> None:
        if options.prompts is None:
            raise UserError("custom has no prompts", where="--prompts", expected="a file with prompts, one per row")

    def prepare(self, session: Session) -> tuple[str, ...]:
        options = session.options
        if options.against_answers is None and session.against is None:
            raise UserError("there is nothing to compare with", where="--against", expected="a run or model, or --against_answers FILE")
        self._prompts = read_prompts(session.option("prompts"))[: options.limit]
        for which, path in (("model", options.answers), ("against", options.against_answers)):
            if path is not None:
                self._answers[which] = self._given(path)
        return tuple(which for which in ("against", "model") if which not in self._answers)

    def _given(self, path: Path) -> list[str]:
        given = dict(read_prompt_answers(path))
        texts = [as_text(prompt) for prompt in self._prompts]
        if missing := [text for text in texts if text not in given]:
            raise DataError(f"{len(missing)} of {len(texts)} prompts have no answer, first {missing[0][:80]!r}", where=str(path))
        return [given[text] for text in texts]

    def measure(self, session: Session, which: str, subject: Subject) -> None:
        self._answers[which] = [answer.text for answer in session.answers(self._prompts, session.sampling(512), which)]

    def run(self, session: Session) -> Record:
        options, prompts = session.options, self._prompts
        own, other = self._answers["model"], self._answers["against"]
        found = compare_answers(
            prompts,
            own,
            other,
            session.judge,
            session.judgement_cache,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=session.step("judgements"),
        )
        shown = [
            {"prompt": as_text(prompt), "model": one, "against": two, "outcome": outcome}
            for prompt, one, two, outcome in zip(prompts, own, other, found.outcomes, strict=True)
        ]
        against = str(options.against_answers) if options.against_answers else session.against
        return {"against": against, **found.to_dict(), "shown": shown}

    def lines(self, result: Record) -> Iterator[str]:
        judged = f"{result['num_judged']} of {result['num_prompts']} prompts judged"
        yield f"win rate {interval(result['win_rate'], '.1%')} over {result['against']}, {judged}"
        yield ", ".join(f"{name} {interval(result[name], '.1%')}" for name in ("wins", "ties", "losses"))
        if result["first_place"] is not None:
            share = f"{result['first_place']:.0%} of its decisions"
            yield f"the judge took the answer shown first in {share}; {result['num_inconsistent']} prompts flipped with the order"
        yield from power_of_rate(result["win_rate"], result["num_judged"])
        yield from gaps(result)

    def show(self, result: Record) -> Shown:
        against = str(result["against"] or "another model").rstrip("/").rpartition("/")[2]
        shown = Shown("Your own prompts, against another model", "Own prompts")
        shown.lead.append(f"Against {against}; every pair is shown to the judge in both orders.")
        names = {"win rate": "win_rate", "won": "wins", "tied": "ties", "lost": "losses"}
        shown.scores = [Score(name, result[key], ".1%") for name, key in names.items()]
        shares = {name: result[key] for name, key in names.items() if name != "win rate"}
        shown.figures = [Drawing("Won, tied, lost", shares, style=".0%", low=0.0, high=1.0)]
        if result["first_place"] is not None:
            shown.lead.append(f"The judge took the answer shown first in {result['first_place']:.0%} of its decisions.")
        shown.lead += [f"{said}." for said in (*power_of_rate(result["win_rate"], result["num_judged"]), *gaps(result))]
        shown.answers = AnswerColumns("shown", (("against", against), ("model", "this model")), note="outcome")
        return shown
