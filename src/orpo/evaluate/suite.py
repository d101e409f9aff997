"""The tasks of `orpo eval`: each loads what it needs, goes through the caches, and writes `<folder>/<task>.json`.

A task that cannot be done does not keep the others from being done; what went wrong is told at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import DataError, UserError
from orpo.evaluate.answers import Sampling, answer_prompts
from orpo.evaluate.cache import Cache
from orpo.evaluate.options import EvalOptions
from orpo.evaluate.prompts import NEUTRAL_PROMPTS, NEUTRAL_TEXT, read_passages, read_prompt_answers, read_prompts
from orpo.evaluate.tasks import alpacaeval, custom, ifeval, mtbench, retention
from orpo.evaluate.tasks.pairs import cached_scores, evaluate_pairs
from orpo.inference.ready import Subject, Target, load_subject
from orpo.system.files import write_atomically
from orpo.system.machine import versions
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.data.types import Text
    from orpo.evaluate.judging.judges import Judge
    from orpo.evaluate.judging.local import RewardModel
    from orpo.inference.generate import Answer

FORMAT = 1
"""Of the result files."""
KEEP_BOTH_PARAMETERS = 1_500_000_000
"""Up to this size the model and the one that it is compared with stay in memory together; larger ones take turns."""

Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


class Evaluation:
    """An evaluation of one target.

    Args:
        options: what to do.
        tell: receives lines for the user.
        progress: receives (what, done, total).

    Raises:
        UserError: the options do not fit together.
    """

    def __init__(
        self, options: EvalOptions, tell: Callable[[str], None] = lambda line: None, progress: Progress = lambda what, done, total: None
    ) -> None:
        options.check()
        self.options, self.tell, self.progress = options, tell, progress
        self.target = Target.find(options.target) if options.target is not None else None
        self.folder = (self.target or Target(self._name_of_answers(), None)).folder(options.output)
        self._loaded: dict[str, Subject] = {}

    def run(self) -> tuple[dict[str, Record], dict[str, UserError]]:
        """Do all tasks; (records by task, errors by task)."""
        tasks: dict[str, Callable[[], Record]] = {
            "pairs": self._pairs,
            "retention": self._retention,
            "ifeval": self._ifeval,
            "mtbench": self._mtbench,
            "alpacaeval": self._alpacaeval,
            "custom": self._custom,
        }
        records, errors = {}, {}
        for name in self.options.tasks:
            start_s = time.perf_counter()
            try:
                result = tasks[name]()
            except UserError as error:
                if len(self.options.tasks) == 1:
                    raise
                errors[name] = error
                self.tell(f"{name} could not be done: {error}")
                continue
            records[name] = self._write(name, result, time.perf_counter() - start_s)
        return records, errors

    # ---- what tasks share ----------------------------------------------------------------------------------------------------------

    @property
    def against(self) -> str | None:
        """Name of the model to compare with, if there is one."""
        if self.options.against is not None:
            return self.options.against
        return self.target.base if self.target is not None and self.options.has_before else None

    def subject(self, which: str = "model") -> Subject:
        """The loaded model, or the one to compare with (`which` = "against")."""
        if which not in self._loaded:
            name = self.options.target if which == "model" else self.against
            if name is None:
                raise UserError("this needs a model", where="orpo eval", expected="a run or a model")
            big = [key for key, other in self._loaded.items() if other.facts["num_parameters"] > KEEP_BOTH_PARAMETERS]
            for key in big:
                del self._loaded[key]
            is_before = which == "against" and self.options.against is None
            config = self.target.config if self.target is not None and is_before else None
            self.tell(f"loading {name}")
            self._loaded[which] = load_subject(name, self.options.loading, config=config)
        return self._loaded[which]

    @cached_property
    def judge(self) -> Judge | RewardModel:
        """The judge that the options name."""
        return self.options.judge.build(self.options.loading)

    @cached_property
    def answer_cache(self) -> Cache:
        """Generated answers."""
        return Cache(self.folder / "cache" / "answers.jsonl")

    @cached_property
    def judgement_cache(self) -> Cache:
        """Replies of judges."""
        return Cache(self.folder / "cache" / "judgements.jsonl")

    @cached_property
    def score_cache(self) -> Cache:
        """Log-probabilities of pairs and texts."""
        return Cache(self.folder / "cache" / "scores.jsonl")

    def step(self, what: str) -> Callable[[int, int], None]:
        """A progress function for a part of a task."""
        return lambda done, total: self.progress(what, done, total)

    def _answers(self, prompts: Sequence[Text], sampling: Sampling, which: str = "model") -> list[Answer]:
        what = "answers" if which == "model" else f"answers of {self.against}"
        return answer_prompts(
            self.subject(which), prompts, sampling, self.answer_cache, batch_size=self.options.batch_size, progress=self.step(what)
        )

    def _sampling(self, max_new_tokens: int, temperature: float = 0.0) -> Sampling:
        options = self.options
        return Sampling(
            max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
            temperature if options.temperature is None else options.temperature,
            options.top_p,
            options.seed,
        )

    def _name_of_answers(self) -> str:
        return Path(self.options.answers).stem if self.options.answers else "answers"

    def _write(self, task: str, result: Record, wall_s: float) -> Record:
        record = {
            "format": FORMAT,
            "task": task,
            "target": self.options.target,
            "answers": None if self.options.answers is None else str(self.options.answers),
            "models": {
                which: {"name": subject.name, "identity": subject.identity, **subject.facts} for which, subject in self._loaded.items()
            },
            "judge": self.judge.identity if "judge" in self.__dict__ else None,
            "seed": self.options.seed,
            "limit": self.options.limit,
            "versions": versions(),
            "time_unix_s": round(time.time(), 3),
            "wall_s": round(wall_s, 3),
            "result": result,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.folder / f"{task}.json", (json.dumps(redact(record), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        )
        return record

    # ---- tasks ---------------------------------------------------------------------------------------------------------------------

    def _pairs(self) -> Record:
        return evaluate_pairs(self)

    def _retention(self) -> Record:
        options = self.options
        passages = read_passages(options.text or NEUTRAL_TEXT)
        prompts = read_passages(NEUTRAL_PROMPTS)[: options.limit]
        sampling = self._sampling(128)
        texts, answers = {}, {}
        for which in ("against", "model") if self.against is not None else ("model",):
            subject = self.subject(which)
            groups = retention.passage_groups(subject.tokenizer, passages)
            scores = cached_scores(subject, groups, self.score_cache, progress=self.step(f"neutral text, {subject.name}"))
            texts[which] = retention.summarise_text(passages, groups, scores, seed=options.seed)
            answers[which] = self._answers(prompts, sampling, which)
        found: Record = {
            "text": str(options.text) if options.text else "neutral.txt",
            "max_new_tokens": sampling.max_new_tokens,
            **{
                which: {**texts[which].to_dict(), "answers": retention.shape_of_answers(answers[which], seed=options.seed).to_dict()}
                for which in texts
            },
            "shown": [{"prompt": prompt, **{which: answers[which][row].text for which in answers}} for row, prompt in enumerate(prompts)],
        }
        if "against" in texts:
            found["change"] = self._retention_change(texts, answers)
        return found

    def _retention_change(self, texts: dict[str, retention.TextResult], answers: dict[str, list[Answer]]) -> Record:
        seed = self.options.seed
        found: Record = {}
        try:
            found["nll"] = retention.text_difference(texts["against"], texts["model"], seed=seed).to_dict()
        except UserError as error:
            found["note"] = str(error)
        pair = [answers["against"], answers["model"]]
        found["mean_tokens"] = retention.mean_change(*([answer.num_tokens for answer in one] for one in pair), seed=seed).to_dict()
        found["repetition"] = retention.mean_change(
            *([retention.repetition(answer.text) for answer in one] for one in pair), seed=seed
        ).to_dict()
        return found

    def _ifeval(self) -> Record:
        items = self._ifeval_items()
        ifeval.load_checkers()  # before hours of generation, not after
        if self.options.answers is not None:
            given = dict(read_prompt_answers(self.options.answers))
            if missing := [item for item in items if item.prompt not in given]:
                raise DataError(
                    f"{len(missing)} of {len(items)} prompts have no answer, first {missing[0].key}", where=str(self.options.answers)
                )
            texts, finishes = [given[item.prompt] for item in items], None
        else:
            answers = self._answers([item.prompt for item in items], self._sampling(ifeval.MAX_NEW_TOKENS))
            texts, finishes = [answer.text for answer in answers], [answer.finish for answer in answers]
        found = ifeval.check_answers(items, texts, seed=self.options.seed)
        rows = [
            {**ifeval.item_facts(item, verdicts), "response": text}
            for item, verdicts, text in zip(items, found.followed, texts, strict=True)
        ]
        self._write_lines("ifeval-answers.jsonl", rows)
        cut = None if finishes is None else sum(finish != "stop" for finish in finishes)
        return {**found.to_dict(), "num_cut": cut}

    def _ifeval_items(self) -> list[ifeval.Item]:
        options = self.options
        if options.ifeval_prompts is not None:
            return ifeval.read_items(options.ifeval_prompts, limit=options.limit)
        try:
            return ifeval.read_items(limit=options.limit)
        except DataError as error:
            raise DataError(
                f"the prompts cannot be fetched from the hub: {error.what}",
                where="ifeval",
                mend="--ifeval_prompts FILE: input_data.jsonl of instruction_following_eval in github.com/google-research/google-research",
            ) from error

    def _mtbench(self) -> Record:
        options = self.options
        if options.mtbench is None:
            raise UserError("mtbench has no questions", where="--mtbench")
        bench = mtbench.read_bench(options.mtbench, limit=options.limit)
        judge = self._reading_judge("mtbench")
        if options.answers is not None:
            answers, name = mtbench.read_answers(options.answers), mtbench.name_of_answers(options.answers)
        else:
            name = str(options.target)

            def answer(conversations: list[list[dict[str, str]]], temperature: float) -> list[str]:
                prompts = [tuple(conversation) for conversation in conversations]
                return [one.text for one in self._answers(prompts, self._sampling(mtbench.MAX_NEW_TOKENS, temperature))]

            answers = mtbench.answer_turns(bench, answer, temperature=options.temperature)
            self._write_lines(
                "mtbench-answers.jsonl",
                [
                    {"question_id": number, "model_id": name, "choices": [{"index": 0, "turns": list(turns)}]}
                    for number, turns in answers.items()
                ],
            )
        found = mtbench.grade(
            bench,
            answers,
            judge,
            self.judgement_cache,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=self.step("judgements"),
        )
        return {"generator": name, **found.to_dict()}

    def _alpacaeval(self) -> Record:
        options = self.options
        reference = alpacaeval.read_reference(options.alpaca_reference, limit=options.limit)
        judge = self.judge
        if options.answers is not None:
            outputs = alpacaeval.match_outputs(reference, alpacaeval.read_outputs(options.answers))
        else:
            answers = self._answers([one.instruction for one in reference], self._sampling(alpacaeval.MAX_NEW_TOKENS))
            outputs = [
                alpacaeval.Output(one.instruction, answer.text, str(options.target)) for one, answer in zip(reference, answers, strict=True)
            ]
        found = alpacaeval.judge_outputs(
            reference,
            outputs,
            judge,
            self.judgement_cache,
            tables=options.alpaca_tables,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=self.step("judgements"),
        )
        self._write_text("alpacaeval-annotations.jsonl", alpacaeval.as_annotations(reference, outputs, found.preferences))
        return found.to_dict()

    def _custom(self) -> Record:
        options = self.options
        if options.prompts is None:
            raise UserError("custom has no prompts", where="--prompts")
        prompts = read_prompts(options.prompts)[: options.limit]
        judge = self.judge
        sampling = self._sampling(512)
        own = self._given_or_generated(options.answers, prompts, sampling, "model")
        if options.against_answers is None and self.against is None:
            raise UserError("there is nothing to compare with", where="--against", expected="a run or model, or --against_answers FILE")
        other = self._given_or_generated(options.against_answers, prompts, sampling, "against")
        found = custom.compare_answers(
            prompts,
            own,
            other,
            judge,
            self.judgement_cache,
            seed=options.seed,
            retry_malformed=options.retry_malformed,
            progress=self.step("judgements"),
        )
        shown = [
            {"prompt": custom.as_text(prompt), "model": one, "against": two, "outcome": outcome}
            for prompt, one, two, outcome in zip(prompts, own, other, found.outcomes, strict=True)
        ]
        against = str(options.against_answers) if options.against_answers else self.against
        return {"against": against, **found.to_dict(), "shown": shown}

    def _given_or_generated(self, path: Path | None, prompts: Sequence[Text], sampling: Sampling, which: str) -> list[str]:
        if path is None:
            return [answer.text for answer in self._answers(prompts, sampling, which)]
        given = dict(read_prompt_answers(path))
        texts = [custom.as_text(prompt) for prompt in prompts]
        if missing := [text for text in texts if text not in given]:
            raise DataError(f"{len(missing)} of {len(texts)} prompts have no answer, first {missing[0][:80]!r}", where=str(path))
        return [given[text] for text in texts]

    def _reading_judge(self, task: str) -> Judge:
        from orpo.evaluate.judging.local import RewardModel

        if isinstance(self.judge, RewardModel):
            raise UserError("a reward model gives no ratings from 1 to 10", where=task, mend="take a judge that writes, or --tasks custom")
        return self.judge

    def _write_lines(self, name: str, rows: Sequence[Record]) -> None:
        self._write_text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _write_text(self, name: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name, text.encode("utf-8", "replace"))
