"""What the tasks of one evaluation share: models, caches, the judge, sampling, and where results go."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.evaluate.answers import Sampling, answer_prompts, answer_task
from orpo.evaluate.cache import Cache
from orpo.evaluate.crew import Alone
from orpo.evaluate.logprobs import from_plain, packed_logps, token_logps
from orpo.evaluate.options import EvalOptions
from orpo.inference.ready import Subject, Target, load_subject
from orpo.inference.scores import choose_scoring_engine
from orpo.system.files import write_atomically
from orpo.system.machine import versions
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.data.types import Text, TokenGroup
    from orpo.engine.choose import Engine
    from orpo.evaluate.judging.judges import Judge
    from orpo.evaluate.judging.local import RewardModel
    from orpo.inference.generate import Answer
    from orpo.inference.scores import TokenScores

FORMAT = 2
"""Of the result files."""

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


class Session:
    """One evaluation of one target, as its tasks see it.

    Args:
        options: what to do.
        tell: receives lines for the user.
        progress: receives (what, done, total).
        crew: the processes that share what takes long; None for this one alone.

    Attributes:
        target: the run or model; None where only given answers are judged.
        folder: where results go.
    """

    def __init__(self, options: EvalOptions, tell: Tell, progress: Progress, crew: Alone | None = None) -> None:
        self.options, self.tell, self.progress, self.crew = options, tell, progress, crew or Alone()
        self.target = Target.find(options.target) if options.target is not None else None
        self.folder = (self.target or Target(self._name_of_answers(), None)).folder(options.output)
        self._loaded: tuple[str, Subject] | None = None
        self._engine: tuple[Any, Engine] | None = None
        self._described: dict[str, Record] = {}
        self._used: set[str] = set()

    def _name_of_answers(self) -> str:
        return Path(self.options.answers).stem if self.options.answers else "answers"

    def option(self, name: str) -> Any:
        """An option's value: of a task's own ones, too."""
        return self.options.value_of(name)

    # ---- models --------------------------------------------------------------------------------------------------------------------

    @property
    def against(self) -> str | None:
        """Name of the model to compare with, if there is one."""
        if self.options.against is not None:
            return self.options.against
        return self.target.base if self.target is not None and self.options.has_before else None

    @property
    def sides(self) -> tuple[str, ...]:
        """Models to ask, in the order in which they are loaded: "against", where there is one, and "model"."""
        return tuple(which for which, name in (("against", self.against), ("model", self.options.target)) if name is not None)

    def subject(self, which: str = "model") -> Subject:
        """The loaded model, or the one to compare with (`which` = "against"). Another one is let go first: only one is held at a time."""
        if self._loaded is None or self._loaded[0] != which:
            name = self.options.target if which == "model" else self.against
            if name is None:
                raise UserError("this needs a model", where="orpo eval", expected="a run or a model")
            self.release()
            is_before = which == "against" and self.options.against is None
            run = self.target.config if self.target is not None and which == "against" else None
            given = {"config": run} if is_before else {"lengths": run}
            self.tell(f"loading      {name}")
            self._loaded = which, load_subject(name, self.options.loading, **given)
            subject = self._loaded[1]
            self._described[which] = {"name": subject.name, "identity": subject.identity, **subject.facts}
        self._used.add(which)
        return self._loaded[1]

    def release(self) -> None:
        """Let the model go that is loaded, if there is one."""
        if self._loaded is None:
            return
        self._loaded = None
        gc.collect()  # modules and their hooks refer to each other: without it the memory is free some time later
        if "torch" in sys.modules:
            import torch

            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()

    @contextmanager
    def models_of_task(self, used: set[str]) -> Iterator[None]:
        """Models that are asked for meanwhile are added to `used`: a result names those that it is of, and no others."""
        self._used, before = used, self._used
        try:
            yield
        finally:
            self._used = before

    def answers(self, prompts: Sequence[Text], sampling: Sampling, which: str = "model") -> list[Answer]:
        """The model's answers to prompts, through the cache."""
        what = "answers" if which == "model" else f"answers of {self.against}"
        return answer_prompts(
            self.subject(which),
            prompts,
            sampling,
            self.answer_cache,
            batch_size=self.options.batch_size,
            progress=self.step(what),
            crew=self.crew,
            which=which,
        )

    def logps(self, groups: Sequence[TokenGroup], what: str, which: str = "model") -> TokenScores:
        """The model's log-probabilities of the groups' responses, token by token, through the cache."""
        subject = self.subject(which)
        step = self.step(f"{what}, {subject.name}")
        return token_logps(subject, groups, self.score_cache, progress=step, crew=self.crew, which=which)

    def do(self, task: dict[str, Any]) -> list[Any]:
        """A piece of work that the first process of several has handed to this one."""
        subject = self.subject(task["which"])
        if task["do"] == "answers":
            return answer_task(subject, task)
        groups = [from_plain(value) for value in task["payload"]]
        if self._engine is None or self._engine[0] != (task["which"], task["first"]):
            engine = choose_scoring_engine(subject.model, [from_plain(value) for value in task["first"]])
            self._engine = (task["which"], task["first"]), engine
        return packed_logps(subject, groups, self._engine[1])

    def sampling(self, max_new_tokens: int, temperature: float = 0.0) -> Sampling:
        """How to generate: a task's own numbers, or those that were asked for."""
        options = self.options
        return Sampling(
            max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
            temperature if options.temperature is None else options.temperature,
            options.top_p,
            options.seed,
        )

    @cached_property
    def judge(self) -> Judge | RewardModel:
        """The judge that the options name."""
        return self.options.judge.build(self.options.loading)

    # ---- what was computed before, and where results go ------------------------------------------------------------------------------

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

    def write_result(self, task: str, result: Record, show: Record | None, used: set[str], wall_s: float) -> Record:
        """Put a task's record into its file."""
        record = {
            "format": FORMAT,
            "task": task,
            "target": self.options.target,
            "answers": None if self.options.answers is None else str(self.options.answers),
            "models": {which: described for which, described in self._described.items() if which in used},
            "judge": self.judge.identity if "judge" in self.__dict__ else None,
            "seed": self.options.seed,
            "limit": self.options.limit,
            "versions": versions(),
            "time_unix_s": round(time.time(), 3),
            "wall_s": round(wall_s, 3),
            "result": result,
            "show": show,
        }
        self.write_text(f"{task}.json", json.dumps(redact(record), indent=2, ensure_ascii=False) + "\n")
        return record

    def write_lines(self, name: str, rows: Sequence[Record]) -> None:
        """Put rows into a file beside the results."""
        self.write_text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_text(self, name: str, text: str) -> None:
        """Put text into a file beside the results, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name, text.encode("utf-8", "replace"))
