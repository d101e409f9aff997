"""Everything that can be asked of an evaluation, in one value; the flags of `orpo eval`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.inference.ready import Loading

if TYPE_CHECKING:
    from orpo.evaluate.judging.judges import Judge
    from orpo.evaluate.judging.local import RewardModel

DEFAULT_TASKS = ("pairs", "retention")
KEY_VARIABLES = ("ORPO_JUDGE_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges.

    Attributes:
        url, model: an OpenAI-compatible endpoint; the key is read from the environment.
        local: a judge or reward model, from a folder or the hub.
        key_variable: environment variable that holds the key; None looks in the usual ones.
        options: further fields of the request.
    """

    url: str | None = None
    model: str | None = None
    local: str | None = None
    key_variable: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    wants_logprobs: bool = False
    num_workers: int = 4
    timeout_s: float = 120.0
    num_retries: int = 5

    def build(self, loading: Loading) -> Judge | RewardModel:
        """The judge, loaded or ready to be asked.

        Raises:
            UserError: none is named, both are, or the one that is cannot be used.
        """
        if self.url and self.local:
            raise UserError("two judges are named", where="--judge, --judge_url", mend="keep one of them")
        if self.url:
            return self._endpoint(self.url)
        if self.local:
            return self._local(self.local, loading)
        raise UserError(
            "this needs a judge",
            where="judge",
            mend="--judge_url http://127.0.0.1:8000/v1 --judge_model NAME (OpenAI's protocol), or --judge FOLDER|HUB_ID (your own model)",
        )

    def _endpoint(self, url: str) -> Judge:
        from orpo.evaluate.judging.endpoint import EndpointJudge

        if not self.model:
            raise UserError("the judge's model has no name", where="--judge_model", expected="the name that its server knows it by")
        return EndpointJudge(
            url,
            self.model,
            self._key(),
            options=self.options,
            wants_logprobs=self.wants_logprobs,
            num_workers=self.num_workers,
            timeout_s=self.timeout_s,
            num_retries=self.num_retries,
        )

    def _key(self) -> str | None:
        if self.key_variable is not None:
            if not os.environ.get(self.key_variable):
                raise UserError(f"the environment variable {self.key_variable} is not set", where="--judge_key_env")
            return os.environ[self.key_variable]
        return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)

    def _local(self, name: str, loading: Loading) -> Judge | RewardModel:
        from orpo.evaluate.judging.local import LocalJudge, RewardModel, is_reward_model

        if is_reward_model(name):
            return RewardModel(name, device=loading.device)
        return LocalJudge(name, device=loading.device)


# Given from Python as text or as `Path`; kept as what the tasks take.
_NAMES = ("target", "against", "data", "ifeval_prompts")
_PATHS = ("answers", "against_answers", "mtbench", "alpaca_reference", "alpaca_tables", "prompts", "text", "output")
_KINDS: dict[str, type[str] | type[Path]] = {**dict.fromkeys(_NAMES, str), **dict.fromkeys(_PATHS, Path)}


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, on what, how. From Python, paths may be given as text or `Path`.

    Attributes:
        target: run, model, or None where only given answers are judged.
        tasks: names of tasks, those of plugins among them.
        against: model or run to compare with; None takes the model that the run started from, where there is a run.
        has_before: compare with that one at all.
        answers, against_answers: files with answers, instead of generating them.
        data, split: rows for pairs; None takes those that the run held out.
        slices: "length_difference" or columns to part the pairs by.
        limit: most rows or prompts of each task.
        ifeval_prompts: file or hub id.
        mtbench: folder with FastChat's three files.
        alpaca_reference: file of reference outputs; None fetches the published one.
        alpaca_tables: folder with the package's tables.
        prompts: file of own prompts (custom).
        text: file of neutral text (retention).
        max_new_tokens, temperature: None for each task's own.
        output: folder for results; None for the run's `eval`.
        retry_malformed: ask again where a kept verdict could not be read.
        given: options of further tasks, by name.
        plugins: modules or files that bring tasks of their own.

    Example:
        >>> from orpo.evaluate.options import EvalOptions
        >>> EvalOptions("model", tasks=("pairs",), data="pairs.jsonl").check()
    """

    target: str | None
    tasks: tuple[str, ...] = DEFAULT_TASKS
    against: str | None = None
    has_before: bool = True
    answers: Path | None = None
    against_answers: Path | None = None
    data: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ("length_difference",)
    limit: int | None = None
    ifeval_prompts: str | None = None
    mtbench: Path | None = None
    alpaca_reference: Path | None = None
    alpaca_tables: Path | None = None
    prompts: Path | None = None
    text: Path | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    output: Path | None = None
    retry_malformed: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    loading: Loading = field(default_factory=Loading)
    judge: JudgeOptions = field(default_factory=JudgeOptions)

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, (str, Path)):
                object.__setattr__(self, name, kind(value))

    def value_of(self, name: str) -> Any:
        """An option's value: a field of this class, else what `given` holds."""
        return getattr(self, name) if name in _FIELDS else self.given.get(name)

    def check(self) -> None:
        """Find what does not fit together before anything is loaded; what a task needs it checks itself.

        Raises:
            UserError: the first such thing.
        """
        if self.limit is not None and self.limit < 1:
            raise UserError(f"found {self.limit}", where="--limit", expected="at least 1")


_FIELDS = frozenset(field.name for field in fields(EvalOptions))
