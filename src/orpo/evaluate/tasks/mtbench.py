"""MT-Bench: 80 two-turn questions in eight categories, each turn graded from 1 to 10 by a judge.

Questions, judge prompts and reference answers are read as published (FastChat's `question.jsonl`, `judge_prompts.jsonl`,
`reference_answer…jsonl`); none of them ships with this package.

Source: Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena (arXiv 2306.05685), single-answer grading.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError, UserError
from orpo.evaluate.bootstrap import Estimate, estimate_mean
from orpo.evaluate.judging.judges import Conversation, Judge, Reply, ask_all, fill
from orpo.evaluate.judging.local import RewardModel
from orpo.evaluate.judging.verdicts import read_rating
from orpo.evaluate.task import Record, Task, TaskOption, register
from orpo.evaluate.wording import gaps, interval
from orpo.report.shown import Drawing, Score, Shown

if TYPE_CHECKING:
    from orpo.evaluate.cache import Cache
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.session import Session

MAX_NEW_TOKENS = 1024
"""As FastChat generates answers."""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers, by category, as published; the others are greedy."""
REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding"})
"""Graded against a reference answer."""

Turns = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the bench."""

    number: int
    category: str
    turns: Turns


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is published of the bench.

    Attributes:
        questions: in the order of the file.
        references: question number -> reference answers of its turns.
        prompts: the judge's prompts by name.
    """

    questions: tuple[Question, ...]
    references: Mapping[int, Turns]
    prompts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class MTBenchResult:
    """Scores from 1 to 10. Means are over judged turns; intervals over questions.

    Attributes:
        score: over both turns of all questions.
        by_turn, by_category: the same for parts.
        num_malformed: replies of the judge without exactly one rating; they count in no mean.
        num_unanswered: questions to the judge without a reply.
        ratings: question number -> rating of each turn, None where there is none.
    """

    num_questions: int
    score: Estimate
    by_turn: tuple[Estimate, ...]
    by_category: dict[str, Estimate]
    num_judged: int
    num_malformed: int
    num_unanswered: int
    ratings: dict[int, tuple[float | None, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "num_questions": self.num_questions,
            "score": self.score.to_dict(),
            "by_turn": [turn.to_dict() for turn in self.by_turn],
            "by_category": {name: value.to_dict() for name, value in self.by_category.items()},
            "num_judged": self.num_judged,
            "num_malformed": self.num_malformed,
            "num_unanswered": self.num_unanswered,
            "ratings": {str(number): list(ratings) for number, ratings in self.ratings.items()},
        }


def read_bench(folder: str | Path, *, limit: int | None = None) -> Bench:
    """The bench from a folder (FastChat's `data`, or any that has the three files at any depth), or some questions of each category.

    Raises:
        UserError: a file is missing.
        DataError: a file is not what it should be.
    """
    root = Path(folder).expanduser()
    questions = [
        Question(int(row["question_id"]), str(row["category"]), tuple(row["turns"]))
        for row in _rows(_find(root, "question.jsonl"), ("question_id", "category", "turns"))
    ]
    prompts = {row["name"]: row for row in _rows(_find(root, "judge_prompts.jsonl"), ("name", "system_prompt", "prompt_template"))}
    chosen = tuple(spread(questions, limit))
    references = {}
    if any(question.category in REFERENCE_CATEGORIES for question in chosen):
        references = read_answers(_find(root, "reference_answer*.jsonl", "reference_answer/*.jsonl"))
    bench = Bench(chosen, references, prompts)
    _check(bench, root)
    return bench


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, taken from the categories in turn, in their old order: the file is sorted by category."""
    seen: Counter[str] = Counter()
    turns = []
    for question in questions:
        turns.append(seen[question.category])
        seen[question.category] += 1
    picked = sorted(range(len(questions)), key=lambda number: (turns[number], number))[:limit]
    return [questions[number] for number in sorted(picked)]


def read_answers(path: str | Path) -> dict[int, Turns]:
    """Answers in FastChat's form (`question_id`, `choices[0].turns`), such as those that authors publish.

    Raises:
        DataError: the file has another form.
    """
    found = {}
    for row in _rows(Path(path), ("question_id", "choices")):
        try:
            found[int(row["question_id"])] = tuple(str(turn) for turn in row["choices"][0]["turns"])
        except (LookupError, TypeError, ValueError) as error:
            raise DataError("not an answer to MT-Bench", where=str(path), expected="question_id and choices[0].turns") from error
    return found


def name_of_answers(path: str | Path) -> str:
    """The model that published answers are by, as their file says, else the file's name."""
    row = next(iter(_rows(Path(path), ("question_id",))), {})
    return str(row.get("model_id") or Path(path).stem)


def answer_turns(
    bench: Bench, answer: Callable[[list[list[dict[str, str]]], float], list[str]], *, temperature: float | None = None
) -> dict[int, Turns]:
    """Have a model answer all turns, the second ones after its own first.

    Args:
        bench: the questions.
        answer: gives the answers to conversations, at a temperature.
        temperature: None for the published one of each category.
    """
    turns: dict[int, list[str]] = {question.number: [] for question in bench.questions}
    for turn in range(max(len(question.turns) for question in bench.questions)):
        heats: dict[float, list[Question]] = {}
        for question in bench.questions:
            if turn < len(question.turns):
                heat = TEMPERATURES.get(question.category, 0.0) if temperature is None else temperature
                heats.setdefault(heat, []).append(question)
        for heat, questions in sorted(heats.items()):
            texts = answer([_conversation(question, turns[question.number]) for question in questions], heat)
            for question, text in zip(questions, texts, strict=True):
                turns[question.number].append(text.strip())
    return {number: tuple(texts) for number, texts in turns.items()}


def grade(
    bench: Bench,
    answers: Mapping[int, Turns],
    judge: Judge,
    cache: Cache,
    *,
    seed: int = 0,
    retry_malformed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MTBenchResult:
    """Grade the answers, each turn by itself.

    Raises:
        DataError: a question has no answer.
        JudgeUnavailable: the judge stopped answering; what it said is kept in the cache.
    """
    missing = [question.number for question in bench.questions if len(answers.get(question.number, ())) < len(question.turns)]
    if missing:
        raise DataError(f"{len(missing)} question(s) have no answer, first {missing[0]}", where="mtbench")
    asked = [(question, turn) for question in bench.questions for turn in range(len(question.turns))]
    conversations = [judge_conversation(bench, question, answers[question.number], turn) for question, turn in asked]
    is_stale = _is_malformed if retry_malformed else None
    replies = ask_all(judge, conversations, cache, is_stale=is_stale, progress=progress).replies
    ratings: dict[int, list[float | None]] = {question.number: [] for question in bench.questions}
    for (question, _), reply in zip(asked, replies, strict=True):
        ratings[question.number].append(None if reply is None else read_rating(reply.text))
    num_malformed = sum(reply is not None and _is_malformed(reply) for reply in replies)
    return _summarise(bench, ratings, num_malformed, sum(reply is None for reply in replies), seed)


def judge_conversation(bench: Bench, question: Question, answers: Turns, turn: int) -> Conversation:
    """What the judge is shown for a turn: the published prompt, with the reference where the category has one."""
    is_referenced = question.category in REFERENCE_CATEGORIES
    name = ("single-math-v1" if is_referenced else "single-v1") + ("-multi-turn" if turn else "")
    prompt = bench.prompts[name]
    values = {"question": question.turns[0], "answer": answers[0]}
    for number in range(len(question.turns)):
        values |= {f"question_{number + 1}": question.turns[number], f"answer_{number + 1}": answers[number]}
    if is_referenced:
        values |= {f"ref_answer_{number + 1}": text for number, text in enumerate(bench.references[question.number])}
    return (
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": fill(prompt["prompt_template"], values)},
    )


def _is_malformed(reply: Reply) -> bool:
    return read_rating(reply.text) is None


def _summarise(
    bench: Bench, ratings: Mapping[int, Sequence[float | None]], num_malformed: int, num_unanswered: int, seed: int
) -> MTBenchResult:
    rows = [
        (question, turn, rating)
        for question in bench.questions
        for turn, rating in enumerate(ratings[question.number])
        if rating is not None
    ]
    if not rows:
        problem = f"the judge gave no rating that can be read: {num_malformed} malformed, {num_unanswered} missing"
        raise UserError(problem, where="mtbench", mend="look at its replies in eval/cache, or take another judge")

    def mean(chosen: list[tuple[Question, int, float]]) -> Estimate:
        return estimate_mean([rating for _, _, rating in chosen], [question.number for question, _, _ in chosen], seed=seed)

    turns = sorted({turn for _, turn, _ in rows})
    categories = list(dict.fromkeys(question.category for question, _, _ in rows))
    return MTBenchResult(
        num_questions=len(bench.questions),
        score=mean(rows),
        by_turn=tuple(mean([row for row in rows if row[1] == turn]) for turn in turns),
        by_category={category: mean([row for row in rows if row[0].category == category]) for category in categories},
        num_judged=len(rows),
        num_malformed=num_malformed,
        num_unanswered=num_unanswered,
        ratings={number: tuple(values) for number, values in ratings.items()},
    )


def _conversation(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for said, answer in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def _find(root: Path, *patterns: str) -> Path:
    for pattern in patterns:
        found = sorted(root.glob(f"**/{pattern}")) if root.is_dir() else []
        if found:
            return found[0]
    raise UserError(
        f"there is no {patterns[0]}",
        where=str(root),
        expected="a folder with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer….jsonl",
        mend="take fastchat/llm_judge/data of github.com/lm-sys/FastChat",
    )


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"broken JSON: {error}", where=f"{path}:{number}") from error
        if not isinstance(row, dict) or any(name not in row for name in needed):
            raise DataError("not a row of MT-Bench", where=f"{path}:{number}", expected=", ".join(needed))
        rows.append(row)
    return rows


def _check(bench: Bench, root: Path) -> None:
    names = {"single-v1", "single-v1-multi-turn"}
    if any(question.category in REFERENCE_CATEGORIES for question in bench.questions):
        names |= {"single-math-v1", "single-math-v1-multi-turn"}
    if lacking := sorted(names - bench.prompts.keys()):
        raise DataError(f"judge_prompts.jsonl lacks {', '.join(lacking)}", where=str(root))
    bare = [
        question.number
        for question in bench.questions
        if question.category in REFERENCE_CATEGORIES and len(bench.references.get(question.number, ())) < len(question.turns)
    ]
    if bare:
        raise DataError(f"no reference answer for question {bare[0]}" + (f" and {len(bare) - 1} more" if bare[1:] else ""), where=str(root))


# ---- the task --------------------------------------------------------------------------------------------------------------------------


@register
class MTBenchTask(Task):
    """Scores from 1 to 10, of generated or given answers."""

    name = "mtbench"
    help = "80 two-turn questions, graded from 1 to 10 by a judge"
    options = (TaskOption("mtbench", "FastChat's question, judge_prompts and reference_answer files", Path, metavar="FOLDER"),)
    takes_answers = True

    def __init__(self) -> None:
        self._bench = Bench((), {}, {})

    @classmethod
    def check(cls, options: EvalOptions) -> None:
        if options.mtbench is None:
            expected = "the folder with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer….jsonl"
            raise UserError("mtbench has no prompts", where="--mtbench", expected=expected)

    def prepare(self, session: Session) -> tuple[str, ...]:
        self._bench = read_bench(session.option("mtbench"), limit=session.options.limit)
        return ()

    def run(self, session: Session) -> Record:
        options, judge = session.options, session.judge
        if isinstance(judge, RewardModel):
            mend = "take a judge that writes, or --tasks custom"
            raise UserError("a reward model gives no ratings from 1 to 10", where="mtbench", mend=mend)
        if options.answers is not None:
            answers, name = read_answers(options.answers), name_of_answers(options.answers)
        else:
            answers, name = self._answer(session), str(options.target)
        found = grade(
            self._bench,
            answers,
            judge,
            session.judgement_cache,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=session.step("judgements"),
        )
        return {"generator": name, **found.to_dict()}

    def _answer(self, session: Session) -> dict[int, Turns]:
        def answer(conversations: list[list[dict[str, str]]], temperature: float) -> list[str]:
            prompts = [tuple(conversation) for conversation in conversations]
            return [one.text for one in session.answers(prompts, session.sampling(MAX_NEW_TOKENS, temperature))]

        answers = answer_turns(self._bench, answer, temperature=session.options.temperature)
        model_id = str(session.options.target)
        rows = [
            {"question_id": number, "model_id": model_id, "choices": [{"index": 0, "turns": list(turns)}]}
            for number, turns in answers.items()
        ]
        session.write_lines("mtbench-answers.jsonl", rows)
        return answers

    def lines(self, result: Record) -> Iterator[str]:
        turns = ", ".join(f"turn {number} {interval(turn, '.2f')}" for number, turn in enumerate(result["by_turn"], start=1))
        yield f"score {interval(result['score'], '.2f')} ({turns}), {result['num_judged']} judged turns"
        for category, estimate in result["by_category"].items():
            yield f"{category:<12} {interval(estimate, '.2f')}"
        yield from gaps(result)

    def show(self, result: Record) -> Shown:
        turns = {f"turn {number}": turn for number, turn in enumerate(result["by_turn"], start=1)}
        scores = {"all": result["score"], **turns, **result["by_category"]}
        note, categories = "1 to 10, as the judge grades", result["by_category"]
        return Shown(
            "MT-Bench",
            lead=[f"{said}." for said in gaps(result)],
            scores=[Score(name, value, ".2f", is_better=1) for name, value in scores.items()],
            figures=[Drawing("Scores by category", categories, kind="radar", style=".2f", low=0.0, high=10.0, note=note)],
        )
