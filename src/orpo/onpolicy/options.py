"""What can be asked of on-policy pairs: the flags of `orpo pairs`, and the keys of `on_policy:` in the configuration of a run."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orpo.config.values import NotAcceptedError, describe, from_yaml
from orpo.errors import UserError
from orpo.evaluate.answers import Sampling
from orpo.onpolicy.answering import Draws
from orpo.onpolicy.choice import PairRule
from orpo.onpolicy.scorers import IFEvalScorer, JudgeScorer, LengthScorer, LogpScorer, MatchScorer, RewardScorer, Scorer, VerifierScorer
from orpo.onpolicy.verifier import Verifier

if TYPE_CHECKING:
    from orpo.inference.ready import Loading


@dataclass(frozen=True)
class OnPolicyOptions:
    """How answers are sampled, scored and chosen."""

    num_samples: int = field(default=4, metadata={"help": "answers of each prompt and model"})
    temperature: float = field(default=0.8, metadata={"help": "of sampling; 0 gives the same answer every time"})
    top_p: float = field(default=1.0, metadata={"help": "sample from the likeliest tokens up to this probability"})
    max_new_tokens: int = field(default=256, metadata={"help": "most tokens of an answer"})
    seed: int = field(default=0, metadata={"help": "of the samples"})
    batch_size: int = field(default=64, metadata={"help": "answers at a time; changes none beyond rounding"})
    keep_answers: bool = field(default=False, metadata={"help": "the rows' own answers are candidates too"})
    verify: list[str] | str | None = field(
        default=None,
        metadata={"help": "a function that scores answers: (prompt, answer) or (prompt, answer, row)", "metavar": "FILE.py:FUNCTION"},
    )
    verify_time_s: float = field(default=5.0, metadata={"help": "seconds of a call"})
    verify_memory_mib: int = field(default=1024, metadata={"help": "memory of a call, in MiB"})
    exact: str | None = field(
        default=None, metadata={"help": "column with the reference: 1 where the answer is the same text", "metavar": "COLUMN"}
    )
    numeric: str | None = field(
        default=None, metadata={"help": "column with the reference: 1 where the last numbers agree", "metavar": "COLUMN"}
    )
    ifeval: bool = field(default=False, metadata={"help": "share of followed instructions (instruction_id_list, kwargs)"})
    reward: str | None = field(default=None, metadata={"help": "a reward model (sequence classifier)", "metavar": "MODEL"})
    judge: str | None = field(
        default=None, metadata={"help": "a language model of your own that compares answers in both orders", "metavar": "MODEL"}
    )
    judge_url: str | None = field(default=None, metadata={"help": "a judge behind OpenAI's protocol", "metavar": "URL"})
    judge_model: str | None = field(default=None, metadata={"help": "the judge's name there", "metavar": "NAME"})
    judge_key_env: str | None = field(default=None, metadata={"help": "environment variable with its key", "metavar": "VARIABLE"})
    logp: bool = field(default=False, metadata={"help": "mean log-probability of the answer under the first model"})
    length: bool = field(default=False, metadata={"help": "words of the answer; give it a weight"})
    weights: dict[str, float] | None = field(
        default=None, metadata={"help": "weight of each scorer (1), such as passed=1,length=-0.01", "metavar": "NAME=W,…"}
    )
    choose: Literal["best_worst", "best_low", "right_wrong", "all"] = field(default="best_worst", metadata={"help": "how pairs are chosen"})
    min_margin: float = field(default=0.0, metadata={"help": "least difference of scores; equal ones never make a pair"})
    max_pairs: int = field(default=1, metadata={"help": "most pairs of a prompt"})
    max_length_ratio: float | None = field(default=None, metadata={"help": "most that the longer answer may be of the shorter"})
    max_similarity: float = field(default=0.95, metadata={"help": "pairs with a larger share of equal words are left out"})
    right_at: float = field(default=1.0, metadata={"help": "right_wrong: from this score on an answer is right"})
    cut: Literal["rejected", "drop", "keep"] = field(default="rejected", metadata={"help": "answers cut at max_new_tokens"})

    @classmethod
    def of(cls, values: Mapping[str, Any], *, where: str = "on_policy") -> OnPolicyOptions:
        """From keys and values, as a configuration has them.

        Raises:
            UserError: an unknown key, or a value of another kind.
        """
        hints = option_hints()
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                raise UserError(
                    f"unknown key {key!r}", where=where, mend=f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(hints))}"
                )
            try:
                given[key] = from_yaml(hints[key], value)
            except NotAcceptedError:
                raise UserError(f"found {value!r}", where=f"{where}: {key}", expected=describe(hints[key])) from None
        options = cls(**given)
        options.check(where)
        return options

    def check(self, where: str = "on_policy") -> None:
        """Refuse what cannot be meant, before anything is loaded.

        Raises:
            UserError: a value out of range, no scorer, a weight of none.
        """
        try:
            self._check()
        except UserError as error:
            if where and error.where and not error.where.startswith(where):
                error.where = f"{where}: {error.where}"
            raise

    def _check(self) -> None:
        ranges: dict[str, tuple[bool, str]] = {
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "verify_time_s": (0 < self.verify_time_s < float("inf"), "above 0, in seconds"),
            "verify_memory_mib": (self.verify_memory_mib >= 1, "at least 1"),
        }
        for key, (is_right, expected) in ranges.items():
            if not is_right:
                raise UserError(f"found {getattr(self, key)!r}", where=key, expected=expected)
        self.rule.check()
        for keys, is_read, by in (
            (("judge_model", "judge_key_env"), self.judge_url, "judge_url"),
            (("verify_time_s", "verify_memory_mib"), self.verify, "verify"),
            (("right_at",), self.choose == "right_wrong", "choose: right_wrong"),
        ):
            idle = [key for key in keys if getattr(self, key) != _DEFAULTS[key]]
            if idle and not is_read:
                raise UserError(f"nothing reads it without {by}", where=idle[0], mend=f"give {by}, or leave {idle[0]} out")
        names = self.scorer_names()
        if not names:
            raise UserError(
                "nothing says which answers are better",
                where="verify",
                expected="a scorer: verify, exact, numeric, ifeval, reward, judge, judge_url, logp or length",
                mend="--verify checks.py:passed, for instance",
            )
        unknown = [name for name in self.weights or {} if name not in names]
        if unknown:
            raise UserError(f"a weight for {', '.join(unknown)}", where="weights", expected=f"the scorers' names: {', '.join(names)}")
        endless = [name for name, weight in (self.weights or {}).items() if not math.isfinite(weight)]
        if endless:
            raise UserError(f"found {self.weights[endless[0]]}", where=f"weights: {endless[0]}", expected="a number")  # type: ignore[index]
        if names == ["length"] and "length" not in (self.weights or {}):
            raise UserError("length has no weight", where="length", mend="--weights length=-1 prefers short answers, length=1 long ones")

    @property
    def rule(self) -> PairRule:
        """How pairs are chosen."""
        return PairRule(**{item.name: getattr(self, item.name) for item in dataclasses.fields(PairRule)})

    @property
    def draws(self) -> Draws:
        """How answers are drawn."""
        return Draws(self.num_samples, Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed), self.batch_size)

    @property
    def _specs(self) -> list[str]:
        return [self.verify] if isinstance(self.verify, str) else list(self.verify or [])

    def scorer_names(self) -> list[str]:
        """What the scorers are called in weights and rows; a verifier by its function."""
        names: list[str] = []
        for spec in self._specs:
            name = spec.rpartition(":")[2] or "verify"
            names.append(name if name not in names else f"{name}_{len(names) + 1}")
        others = {"judge": self.judge or self.judge_url}
        others |= {name: getattr(self, name) for name in ("exact", "numeric", "ifeval", "reward", "logp", "length")}
        return [*names, *(name for name in ("exact", "numeric", "ifeval", "reward", "judge", "logp", "length") if others[name])]

    def scorers(self, model: str | None, loading: Loading) -> list[Scorer]:
        """The scorers that were asked for.

        Args:
            model: whose log-probabilities count; None where no model of this machine is asked.

        Raises:
            UserError: one cannot be made.
        """
        workers = max(1, min(4, os.cpu_count() or 1))
        found: list[Scorer] = [
            VerifierScorer(name, Verifier(spec, self.verify_time_s, self.verify_memory_mib, workers))
            for name, spec in zip(self.scorer_names(), self._specs, strict=False)
        ]
        if self.exact:
            found.append(MatchScorer("exact", self.exact, is_numeric=False))
        if self.numeric:
            found.append(MatchScorer("numeric", self.numeric, is_numeric=True))
        if self.ifeval:
            found.append(IFEvalScorer())
        if self.reward:
            found.append(RewardScorer("reward", self.reward, loading.device))
        if self.judge or self.judge_url:
            found.append(JudgeScorer("judge", lambda: self._judge().build(loading), None if self.judge_url else self.judge))
        if self.logp:
            if model is None:
                raise UserError("no model of this machine is asked", where="logp", mend="add --model")
            found.append(LogpScorer("logp", model, loading))
        if self.length:
            found.append(LengthScorer())
        return found

    def _judge(self) -> Any:
        from orpo.evaluate.options import JudgeOptions

        return JudgeOptions(url=self.judge_url, model=self.judge_model, local=self.judge, key_variable=self.judge_key_env)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(OnPolicyOptions)}


def option_hints() -> dict[str, Any]:
    """Key -> its type."""
    import typing

    return typing.get_type_hints(OnPolicyOptions)
