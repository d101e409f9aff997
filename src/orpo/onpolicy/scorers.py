"""How good an answer is: scorers, each giving every answer a number, or the reason why it gives none."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orpo.data.types import Dropped, Preference, TokenGroup
from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.judging.judges import Conversation, Judge, ask_all, fill
from orpo.evaluate.judging.local import RewardModel, as_messages, is_reward_model
from orpo.evaluate.judging.verdicts import read_choice
from orpo.evaluate.tasks.custom import QUESTION, SYSTEM_PROMPT
from orpo.models.fingerprint import content_key
from orpo.onpolicy.answering import AskedGroup, Progress, release_memory
from orpo.onpolicy.verifier import Verifier

if TYPE_CHECKING:
    from orpo.inference.ready import Loading
    from orpo.onpolicy.asked import Asked

logger = logging.getLogger(__name__)

Mark = float | str
"""A score, or why there is none."""

Marks = list[list[Mark]]
"""Per prompt, per answer."""

MAX_FAILED_FIRST = 20
"""So many calls of a verifier, and none that gave a score: it is the verifier that is wrong, not the answers."""
_MOST_OPPONENTS = 3
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Scorer(Protocol):
    """Scores answers; what it has scored is in the cache as soon as it is there."""

    name: str

    def check(self, asked: Sequence[Asked]) -> None:
        """Tell what is wrong before anything is sampled.

        Raises:
            UserError: it cannot score answers to these prompts.
        """
        ...

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        """A mark for every answer."""
        ...


def _flat(groups: Sequence[AskedGroup]) -> list[tuple[AskedGroup, int]]:
    return [(group, place) for group in groups for place in range(len(group.attempts))]


def _folded(groups: Sequence[AskedGroup], flat: Sequence[Mark]) -> Marks:
    marks = iter(flat)
    return [[next(marks) for _ in group.attempts] for group in groups]


@dataclass
class VerifierScorer:
    """A function of the user's (`orpo.onpolicy.verifier`)."""

    name: str
    verifier: Verifier

    def check(self, asked: Sequence[Asked]) -> None:
        self.verifier.check()

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        limits = [self.verifier.time_s, self.verifier.memory_mib]
        identity = self.verifier.identity
        requests = [
            {"prompt": group.asked.prompt, "answer": group.attempts[place].text, "row": _plain_row(group.asked.row)}
            for group, place in _flat(groups)
        ]
        keys = [content_key(**identity, **request) for request in requests]

        def is_known(key: str) -> bool:
            value = cache.get(key)  # a failure may have been the limits'
            return value is not None and ("score" in value or value.get("limits") == limits)

        todo = list({key: place for place, key in enumerate(keys) if not is_known(key)}.values())
        num_done, num_scored, first = 0, 0, ""

        def done(number: int, outcome: dict[str, Any]) -> None:
            nonlocal num_done, num_scored, first
            num_done += 1
            if "score" in outcome:
                num_scored += 1
                cache.put(keys[todo[number]], {"score": outcome["score"]})
            else:
                first = first or str(outcome["failed"])
                cache.put(keys[todo[number]], {"failed": str(outcome["failed"])[:1000], "limits": limits})
                if num_done >= MAX_FAILED_FIRST and not num_scored and len(todo) == len(keys):
                    raise UserError(
                        f"none of the first {MAX_FAILED_FIRST} calls gave a score; the first: {first}",
                        where=f"verify: {self.verifier.spec}",
                        expected="a number, True or False for every answer, also for a wrong or an empty one",
                        mend="mend the function; answers are kept, and the same command goes on",
                    )
            progress(f"scores of {self.name}", len(keys) - len(todo) + num_done, len(keys))

        if todo:
            self.verifier.call([requests[place] for place in todo], done)
        values = [cache.get(key) for key in keys]
        return _folded(groups, [float(value["score"]) if "score" in value else str(value["failed"]) for value in values])


def _plain_row(row: Mapping[str, Any]) -> Any:
    """The row as JSON: what is none (dates of a table) as text."""
    import json

    return json.loads(json.dumps(row, default=str, ensure_ascii=False))


@dataclass
class MatchScorer:
    """1 where an answer says what the row's reference says, else 0: the same text, or the same last number."""

    name: str
    column: str
    is_numeric: bool

    def check(self, asked: Sequence[Asked]) -> None:
        missing = [one for one in asked if self._reference(one) is None]
        if not missing:
            return
        columns = ", ".join(sorted({str(key) for one in asked[:100] for key in one.row}))
        kind = "with a number in it" if self.is_numeric else "with the reference"
        raise UserError(
            f"{len(missing)} of {len(asked)} prompts have no {self.column!r} {kind} (first {missing[0].where}); columns: {columns}",
            where=f"{self.name}: {self.column}",
            expected="the column that holds each prompt's reference answer",
            mend="correct the name, or give each row its reference",
        )

    def _reference(self, asked: Asked) -> str | float | None:
        from orpo.data.rows.recognise import lookup

        value = lookup(asked.row, self.column)
        if value is None or isinstance(value, bool):
            return None
        if self.is_numeric:
            return float(value) if isinstance(value, (int, float)) else last_number(str(value))
        return plain_words(str(value)) or None

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        return [[float(self._is_same(self._reference(group.asked), one.text)) for one in group.attempts] for group in groups]

    def _is_same(self, reference: str | float | None, text: str) -> bool:
        if not isinstance(reference, float):
            return plain_words(text) == reference
        number = last_number(text)
        return number is not None and abs(number - reference) <= 1e-6 * max(1.0, abs(reference))


def plain_words(text: str) -> str:
    """A text for exact comparison: white space as single blanks, nothing else changed."""
    return " ".join(text.split())


def last_number(text: str) -> float | None:
    """The last number of a text, `1,234.5` and `-3` too; of the last `\\boxed{…}` or what follows `####` where there is one."""
    for mark in (r"\boxed{", "####"):
        _, found, after = text.rpartition(mark)
        if found and (numbers := _NUMBER.findall(after)):
            return _as_float(numbers[0])
    numbers = _NUMBER.findall(text)
    return _as_float(numbers[-1]) if numbers else None


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("."))
    except ValueError:
        return None


@dataclass
class IFEvalScorer:
    """The share of a row's instructions that an answer follows, by IFEval's checkers (strict)."""

    name: str = "ifeval"

    def check(self, asked: Sequence[Asked]) -> None:
        from orpo.evaluate.tasks.ifeval import load_checkers

        for one in asked:
            self._item(one)
        load_checkers()

    @staticmethod
    def _item(asked: Asked) -> Any:
        from orpo.evaluate.tasks.ifeval import Item

        try:
            names = tuple(str(name) for name in asked.row["instruction_id_list"])
            given = asked.row.get("kwargs") or [{}] * len(names)
            arguments = tuple({key: value for key, value in (one or {}).items() if value is not None} for one in given)
            if not names or len(arguments) != len(names):
                raise ValueError("instruction_id_list and kwargs of different lengths")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"not a row with instructions: {type(error).__name__} {error}",
                where=f"ifeval: {asked.where}",
                expected="instruction_id_list and kwargs, as in IFEval's own rows",
            ) from error
        from orpo.data.rows.messages import plain_text

        return Item(0, plain_text(asked.prompt), names, arguments)

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        from orpo.evaluate.tasks.ifeval import check_answers

        flat = _flat(groups)
        found = check_answers([self._item(group.asked) for group, _ in flat], [group.attempts[place].text for group, place in flat])
        return _folded(groups, [sum(strict for strict, _ in verdicts) / len(verdicts) for verdicts in found.followed])


@dataclass
class RewardScorer:
    """A reward model: a sequence classifier with one output."""

    name: str
    model: str
    device: str | None = None

    def check(self, asked: Sequence[Asked]) -> None:
        if not is_reward_model(self.model):
            raise UserError("is no reward model", where=f"reward: {self.model}", expected="a sequence classifier with one output")

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        model = RewardModel(self.model, device=self.device)
        asked = [(group.asked.prompt, group.attempts[place].text) for group, place in _flat(groups)]
        scores = model.scores(asked, cache, progress=lambda done, total: progress(f"scores of {self.name}", done, total))
        del model
        release_memory()
        return _folded(groups, list(scores))


@dataclass
class JudgeScorer:
    """How many of a prompt's other answers an answer beats, as a judge says who reads each two in both orders; 0.5 is a draw.

    Two orders that disagree are a tie. With more than four answers each meets only its next `_MOST_OPPONENTS` in a circle.
    """

    name: str
    build: Callable[[], Judge | RewardModel]
    local: str | None = None

    def check(self, asked: Sequence[Asked]) -> None:
        if self.local is None:  # a server's is made in no time, and asked nothing
            self.build()
        elif is_reward_model(self.local):
            raise UserError("a reward model scores answers one by one", where=f"judge: {self.local}", mend="name it with --reward")

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        judge = self.build()
        if isinstance(judge, RewardModel):
            raise UserError("a reward model scores answers one by one", where=self.name, mend="name it with --reward")
        meetings = [(number, first, second) for number, group in enumerate(groups) for first, second in _meetings(group)]
        asked = [_question(groups[number], *order) for number, first, second in meetings for order in ((first, second), (second, first))]
        replies = ask_all(judge, asked, cache, progress=lambda done, total: progress(f"verdicts of {self.name}", done, total)).replies
        points: dict[tuple[int, int], list[float]] = {}
        for place, (number, first, second) in enumerate(meetings):
            there, back = (None if reply is None else read_choice(reply.text) for reply in replies[2 * place : 2 * place + 2])
            if there is None or back is None:
                continue
            won = {("A", "B"): 1.0, ("B", "A"): 0.0}.get((there, back), 0.5)
            points.setdefault((number, first), []).append(won)
            points.setdefault((number, second), []).append(1 - won)
        return [[self._mark(points.get((number, place))) for place in range(len(group.attempts))] for number, group in enumerate(groups)]

    @staticmethod
    def _mark(points: list[float] | None) -> Mark:
        return sum(points) / len(points) if points else "no verdict that could be read"


def _meetings(group: AskedGroup) -> list[tuple[int, int]]:
    """Which answers meet: different ones, each text once."""
    texts: dict[str, int] = {}
    for place, attempt in enumerate(group.attempts):
        texts.setdefault(attempt.text.strip(), place)
    places = list(texts.values())
    if len(places) <= _MOST_OPPONENTS + 1:
        return list(itertools.combinations(places, 2))
    ways = {
        tuple(sorted((place, places[(start + step) % len(places)])))
        for start, place in enumerate(places)
        for step in range(1, _MOST_OPPONENTS + 1)
    }
    return sorted(ways)  # type: ignore[arg-type]


def _question(group: AskedGroup, first: int, second: int) -> Conversation:
    messages = as_messages(group.asked.prompt)
    request = str(messages[0]["content"]) if len(messages) == 1 else "\n\n".join(f"[{one['role']}]\n{one['content']}" for one in messages)
    values = {"request": request, "answer_a": group.attempts[first].text, "answer_b": group.attempts[second].text}
    return ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": fill(QUESTION, values)})


@dataclass
class LogpScorer:
    """The mean log-probability of an answer's tokens under a model, in nats: how much it is the model's own."""

    name: str
    model: str
    loading: Loading

    def check(self, asked: Sequence[Asked]) -> None:
        pass

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        from orpo.evaluate.logprobs import means_of, token_logps
        from orpo.inference.ready import load_subject

        subject = load_subject(self.model, self.loading)
        rows = [self._row(group, place) for group, place in _flat(groups)]
        encoded = subject.encoder.encode_many(rows)
        usable = [item for item in encoded if isinstance(item, TokenGroup)]
        logps = (
            token_logps(subject, usable, cache, progress=lambda done, total: progress("log-probabilities", done, total)) if usable else []
        )
        means = iter(means_of(logps))
        marks: list[Mark] = [item.reason if isinstance(item, Dropped) else float(next(means)[0]) for item in encoded]
        del subject
        release_memory()
        return _folded(groups, marks)

    @staticmethod
    def _row(group: AskedGroup, place: int) -> Preference:
        asked, text = group.asked, group.attempts[place].text
        answer = text if isinstance(asked.prompt, str) and not asked.tools else ({"role": "assistant", "content": text},)
        return Preference(asked.prompt, (answer,), (), asked.where, asked.tools, {}, asked.variables)


@dataclass
class LengthScorer:
    """An answer's words. With a weight below 0 it holds against a scorer that likes long answers."""

    name: str = "length"

    def check(self, asked: Sequence[Asked]) -> None:
        pass

    def marks(self, groups: Sequence[AskedGroup], cache: Cache, progress: Progress) -> Marks:
        return [[float(len(one.text.split())) for one in group.attempts] for group in groups]


@dataclass(frozen=True)
class Scoring:
    """The scores of all answers.

    Attributes:
        parts: per prompt, per answer: scorer -> mark.
        totals: the weighted sum, or None where a scorer gave no number.
        failures: scorer -> reason -> how many answers.
    """

    parts: list[list[dict[str, Mark]]]
    totals: list[list[float | None]]
    failures: dict[str, Counter[str]]


def score_all(
    scorers: Sequence[Scorer], weights: Mapping[str, float], groups: Sequence[AskedGroup], cache: Cache, progress: Progress
) -> Scoring:
    """Score every answer with every scorer.

    Raises:
        UserError: a scorer cannot go on; what was scored is kept.
    """
    parts: list[list[dict[str, Mark]]] = [[{} for _ in group.attempts] for group in groups]
    failures: dict[str, Counter[str]] = {}
    for scorer in scorers:
        for of_group, marks in zip(parts, scorer.marks(groups, cache, progress), strict=True):
            for of_answer, mark in zip(of_group, marks, strict=True):
                of_answer[scorer.name] = mark
                if isinstance(mark, str):
                    failures.setdefault(scorer.name, Counter())[mark] += 1
    totals = [[_total(marks, weights) for marks in of_group] for of_group in parts]
    return Scoring(parts, totals, failures)


def _total(marks: Mapping[str, Mark], weights: Mapping[str, float]) -> float | None:
    total = 0.0
    for name, mark in marks.items():
        if isinstance(mark, str):
            return None
        total += weights.get(name, 1.0) * mark
    return total
