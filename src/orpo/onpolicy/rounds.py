"""The course of `orpo train --rounds N`: sample, score, choose, train, evaluate, and again from the weights that came of it.

    RUN/rounds.json                 what every round did, and why the rounds ended
    RUN/held-out/                   answers to held-out prompts, and their scores
    RUN/round-1/pairs.jsonl, .work  as `orpo pairs` leaves them
    RUN/round-1/                    and a run as `orpo train` leaves it

Every step goes on from what it finds, so that the same command goes on wherever it was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.data.types import Text
from orpo.errors import UserError
from orpo.inference.ready import Loading
from orpo.models.fingerprint import content_key
from orpo.onpolicy.answering import Progress, Tell, release_memory
from orpo.onpolicy.asked import Asked, AskedPrompts, read_asked
from orpo.onpolicy.heldout import score_held_out
from orpo.onpolicy.making import NoPairsError, PairsJob, make_pairs
from orpo.onpolicy.options import OnPolicyOptions
from orpo.run.config import RunConfig, as_facts
from orpo.run.folder import COMPLETE, RUNNING, final_weights
from orpo.system.files import write_atomically
from orpo.system.launch import refuse_several
from orpo.system.redact import redact

if TYPE_CHECKING:
    from transformers import TrainerCallback

FILE = "rounds.json"
FORMAT = 1
ORIGIN = "the rounds"
_HELD_OUT_SEED = 1_000_003
"""Added to the seed for held-out answers: every round draws with the same noise, so that rounds differ by their weights."""
_ALONE = (
    "start it without a launcher and without --num_processes; on several: orpo pairs … --out pairs.jsonl, then "
    "orpo train --dataset_name pairs.jsonl --num_processes N"
)
_OF_THE_SOURCE = ("dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name", "eval_fraction", "column_map")
_FREE = frozenset({"output_dir", "rounds", "resume_from_checkpoint", "allow_changed_resume"})


@dataclass(frozen=True)
class RoundOptions:
    """How rounds follow each other; keys of `on_policy:` beside those of `OnPolicyOptions`.

    Attributes:
        old_share: share of earlier rounds' pairs among the rows of a round.
        eval_samples: answers to each held-out prompt.
        patience: so many rounds without a better held-out score, and the rounds end.
        min_distinct: they end where a prompt's answers are different in a smaller share than this.
        max_drift: they end where answers have become so many times as long, or as short, as the start's.
    """

    old_share: float = 0.0
    eval_samples: int = 1
    patience: int = 1
    min_distinct: float = 0.3
    max_drift: float = 2.0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: a value out of range.
        """
        ranges = {
            "old_share": (0 <= self.old_share < 1, "at least 0, below 1"),
            "eval_samples": (self.eval_samples >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "min_distinct": (0 <= self.min_distinct <= 1, "between 0 and 1"),
            "max_drift": (self.max_drift > 1, "above 1"),
        }
        for key, (is_right, expected) in ranges.items():
            if not is_right:
                raise UserError(f"found {getattr(self, key)!r}", where=f"on_policy: {key}", expected=expected)


def read_options(config: RunConfig) -> tuple[int, RoundOptions, OnPolicyOptions]:
    """(number of rounds, how they follow each other, how pairs are made) of a configuration.

    Raises:
        UserError: something in it cannot be meant.
    """
    block, num_rounds = config["on_policy"], config["rounds"]
    if not isinstance(block, dict):
        example = "on_policy: {num_samples: 4, verify: checks.py:passed}"
        raise UserError("rounds need to know how answers are sampled and scored", where="rounds", mend=f"add `{example}` to the file")
    if num_rounds is None:
        num_rounds = 1
    if num_rounds < 1:
        raise UserError(f"found {num_rounds}", where="rounds", expected="at least 1")
    names = {item.name: item for item in fields(RoundOptions)}
    own = {key: value for key, value in block.items() if key in names}
    for key, value in own.items():
        kinds = (int,) if isinstance(names[key].default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UserError(f"found {value!r}", where=f"on_policy: {key}", expected="a whole number" if kinds == (int,) else "a number")
    options = RoundOptions(**own)
    options.check()
    return num_rounds, options, OnPolicyOptions.of({key: value for key, value in block.items() if key not in names})


def read_round_prompts(config: RunConfig, tell: Tell) -> tuple[AskedPrompts, list[Asked]]:
    """(prompts to train on, prompts held out) of a configuration.

    Raises:
        UserError: they cannot be read, one side would be empty, or a prompt is on both.
    """
    column_map = config.data_settings().column_map
    asked = read_asked(config.train_source(), split=config["dataset_train_split"], column_map=column_map)
    evaluation, fraction = config.eval_source(), config["eval_fraction"]
    if evaluation is not None:
        held_out = read_asked(evaluation[0], split=evaluation[1], column_map=column_map).prompts
        both = {one.key for one in held_out} & {one.key for one in asked.prompts}
        if both and not config["allow_overlap"]:
            raise UserError(f"{len(both)} prompts are held out and trained on", where="eval_dataset_name", mend="remove them from one side")
        return asked, held_out
    if fraction is None:
        tell("note         no prompts are held out (eval_fraction, eval_dataset_name): nothing tells whether a round was worth it")
        return asked, []
    held_out = [one for one in asked.prompts if _is_held_out(one, fraction)]
    kept = [one for one in asked.prompts if not _is_held_out(one, fraction)]
    if not held_out or not kept:
        raise UserError(f"of {len(asked.prompts)} prompts one side would be empty", where="eval_fraction", mend="change eval_fraction")
    return replace(asked, prompts=kept), held_out


Bars = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows how far sampling is."""


def run_rounds(config: RunConfig, tell: Tell, callbacks: Callable[[], Sequence[TrainerCallback]], bars: Bars) -> dict[str, Any]:
    """All rounds that are missing.

    Args:
        config: `dataset_name` names prompts, in whatever `orpo train` reads; `eval_dataset_name` or `eval_fraction` those held out.
        callbacks: makes the callbacks of each training.

    Returns:
        What `rounds.json` holds, and `is_already_complete`.

    Raises:
        UserError: anything wrong with configuration, prompts, scorers or folder, or a launcher has started several processes.
        GuardStop, SignalStop: the training of a round was stopped; the same call goes on.
    """
    from orpo.checkpoint import RunLock

    refuse_several("train --rounds", _ALONE)
    num_rounds, options, pairs = read_options(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        return _Rounds(config, folder, num_rounds, options, pairs, tell, callbacks, bars).run()


class _Rounds:
    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        num_rounds: int,
        options: RoundOptions,
        pairs: OnPolicyOptions,
        tell: Tell,
        callbacks: Callable[[], Sequence[TrainerCallback]],
        bars: Bars,
    ) -> None:
        self.config, self.folder, self.num_rounds, self.options, self.pairs = config, folder, num_rounds, options, pairs
        self.tell, self.callbacks, self.bars = tell, callbacks, bars
        self.facts = self._read()

    # ---- the file ----------------------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        identity = content_key(values=_values(self.config))
        new = {"kind": "rounds", "format": FORMAT, "status": RUNNING, "identity": identity, "rounds": [], "stopped_because": None}
        path = self.folder / FILE
        if not path.exists():
            return {**new, "model": self.config["model_name_or_path"], "configuration": _values(self.config)}
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            is_same = facts["identity"] == identity and isinstance(facts["rounds"], list)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot be read: {error}", where=str(path), mend="choose another output_dir") from error
        if not is_same:
            now, before = _values(self.config), facts["configuration"]
            changed = ", ".join(key for key in before if before[key] != now.get(key))
            told = f" ({changed})" if changed else ""
            raise UserError(f"holds rounds of another configuration{told}", where=str(self.folder), mend="choose another output_dir")
        return facts

    def _write(self, **changes: Any) -> None:
        self.facts.update(changes)
        write_atomically(self.folder / FILE, (json.dumps(redact(self.facts), indent=2, ensure_ascii=False) + "\n").encode())

    # ---- the course --------------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Round after round."""
        if len(self.facts["rounds"]) >= self.num_rounds or self.facts["stopped_because"]:
            # A kill may have come between the last round and this word.
            self._write(status=COMPLETE)
            return {**self.facts, "is_already_complete": True}
        asked, held_out = self._prompts()
        self._write(status=RUNNING, num_prompts=len(asked.prompts), num_held_out=len(held_out))
        if held_out and "start" not in self.facts:
            self._write(start=self._held_out(held_out, self.config["model_name_or_path"], is_start=True))
        for number in range(len(self.facts["rounds"]) + 1, self.num_rounds + 1):
            reason = self._round(number, asked, held_out)
            if reason is not None:
                self.tell(f"rounds end   {reason}")
                self._write(stopped_because=reason)
                break
        self._write(status=COMPLETE)
        return {**self.facts, "is_already_complete": False}

    def _prompts(self) -> tuple[AskedPrompts, list[Asked]]:
        """(to train on, held out), which are those of the first start."""
        asked, held_out = read_round_prompts(self.config, self.tell)
        digest = content_key(prompts=[one.key for one in asked.prompts], held_out=[one.key for one in held_out])
        if self.facts.setdefault("prompts", digest) != digest:
            raise UserError("holds rounds on other prompts", where=str(self.folder), mend="choose another output_dir")
        return asked, held_out

    def _round(self, number: int, asked: AskedPrompts, held_out: list[Asked]) -> str | None:
        """One round; why it is the last, or None."""
        folder = self.folder / f"round-{number}"
        model = self._model_before(number)
        self.tell(f"round {number}      from {model}")
        try:
            made = self._pairs(number, folder, model, asked)
        except NoPairsError as error:
            if number == 1:
                raise
            return f"no pair came of round {number}'s answers: {error.what}"
        distinct = made["lengths"]["distinct"]
        if number > 1 and distinct < self.options.min_distinct:
            return f"answers have lost their diversity: {distinct:.0%} of a prompt's answers differ before round {number}"
        num_rows, least = _num_lines(folder / "rows.jsonl"), self._rows_per_step
        if number > 1 and num_rows < least:
            return f"only {num_rows} rows came of round {number}'s answers, and a step takes {least}"
        self._train(number, folder, model)
        release_memory()
        found = self._held_out(held_out, str(folder)) if held_out else None
        facts = {
            "number": number,
            "folder": folder.name,
            "model": model,
            "num_pairs": made["num_pairs"],
            "num_rows": num_rows,
            "left_out": made["left_out"],
            "mean_score": made["mean_score"],
            "lengths": made["lengths"],
            "held_out": found,
        }
        self._write(rounds=[*self.facts["rounds"], facts])
        if found is not None:
            self.tell(f"held out     {_shown(self.facts['start'])} at the start, {_shown(found)} after round {number}")
        return None if number == self.num_rounds else self._why_stop()

    @property
    def _rows_per_step(self) -> int:
        return int(self.config["per_device_train_batch_size"]) * int(self.config["gradient_accumulation_steps"])

    def _model_before(self, number: int) -> str:
        return str(self.config["model_name_or_path"]) if number == 1 else str(self.folder / f"round-{number - 1}")

    def _loading(self, *, is_start: bool) -> Loading:
        config = self.config
        device = "cpu" if config["use_cpu"] else None
        dtype = "float32" if config["bf16"] is False else "auto"  # answers are sampled as rounds are trained
        if not is_start:
            return Loading(device=device, dtype=dtype)
        return Loading(
            device=device,
            dtype=dtype,
            chat_template=config["chat_template"],
            revision=config["model_revision"],
            trust_remote_code=bool(config["trust_remote_code"]),
        )

    def _pairs(self, number: int, folder: Path, model: str, asked: AskedPrompts) -> dict[str, Any]:
        job = PairsJob(
            prompts=str(self.config["dataset_name"]),
            models=(model,),
            output=folder / "pairs.jsonl",
            # An answer's noise comes from prompt, number and seed: with one seed every round would draw with the same noise.
            options=replace(self.pairs, seed=self.pairs.seed + number - 1),
            loading=self._loading(is_start=number == 1),
            asked=asked,
            has_audit=False,
        )
        with self.bars() as progress:
            made = make_pairs(job, self.tell, progress)
        lines = job.output.read_bytes().splitlines(keepends=True)
        write_atomically(folder / "rows.jsonl", b"".join([*lines, *self._old_lines(number, len(lines))]))
        return made

    def _old_lines(self, number: int, num_new: int) -> list[bytes]:
        """Pairs of earlier rounds, spread over them by their hashes: the same ones to the same command."""
        wanted = round(num_new * self.options.old_share / (1 - self.options.old_share))
        old = [
            line
            for earlier in range(1, number)
            for line in (self.folder / f"round-{earlier}" / "pairs.jsonl").read_bytes().splitlines(keepends=True)
        ]
        return sorted(old, key=lambda line: hashlib.sha256(str(number).encode() + line).digest())[:wanted]

    def _train(self, number: int, folder: Path, model: str) -> None:
        from orpo.training.runner import run_training

        own: dict[str, Any] = {
            **dict.fromkeys(_OF_THE_SOURCE),
            "on_policy": None,
            "rounds": None,
            "model_name_or_path": model,
            "dataset_name": str(folder / "rows.jsonl"),
            "dataset_streaming": False,
            "sft_rows": False,
            "eval_strategy": "no",
            "eval_on_start": False,
            "load_best_model_at_end": False,
            "output_dir": str(folder),
            "seed": self.config["seed"] + number - 1,
        }
        if number > 1:
            # The round before lies in a folder, which has no revision and holds the template it was trained with.
            own |= {"model_revision": None, "chat_template": "none" if self.config["chat_template"] == "none" else None}
            weights = final_weights(Path(model))
            own["model_name_or_path"] = str(weights or model)
            if weights is not None and weights.name == "adapter":
                own["use_peft"] = False  # the adapter of the round before is trained on
        given = RunConfig({**self.config.values, **own}, {**self.config.origins, **dict.fromkeys(own, ORIGIN)}, name=folder.name)
        run_training(given, self.tell, list(self.callbacks()))

    def _held_out(self, held_out: Sequence[Asked], model: str, *, is_start: bool = False) -> dict[str, Any]:
        options = replace(self.pairs, num_samples=self.options.eval_samples, seed=self.pairs.seed + _HELD_OUT_SEED)
        work = self.folder / "held-out"
        with self.bars() as progress:
            return score_held_out(held_out, model, options, work, self._loading(is_start=is_start), self.tell, progress).to_dict()

    def _why_stop(self) -> str | None:
        """Why another round would be in vain."""
        start, rounds = self.facts.get("start"), self.facts["rounds"]
        if start is None:
            return None
        values = [start["value"], *(one["held_out"]["value"] for one in rounds)]
        # Of equals the earliest: a round that changed nothing is no better one.
        best = max(range(len(values)), key=lambda place: (values[place], -place))
        if len(values) - 1 - best >= self.options.patience:
            where = "the start" if best == 0 else f"round {best}"
            return f"the held-out score no longer rises: {values[best]:.3f} at {where}, {values[-1]:.3f} after round {len(rounds)}"
        before, now = start["chars"], rounds[-1]["held_out"]["chars"]
        ratio = now / before if before else 1.0
        if not 1 / self.options.max_drift <= ratio <= self.options.max_drift:
            return f"answers drift in length: {before:,.0f} characters at the start, {now:,.0f} after round {len(rounds)}"
        return None


def best_round(facts: dict[str, Any]) -> str:
    """The folder of the round with the best held-out score; the last one where nothing was held out."""
    rounds = facts["rounds"]
    scored = [one for one in rounds if one["held_out"] is not None]
    return str(max(scored, key=lambda one: one["held_out"]["value"])["folder"] if scored else rounds[-1]["folder"])


def _values(config: RunConfig) -> dict[str, Any]:
    """The values that decide what rounds are, wherever they were written."""
    return {key: item["value"] if isinstance(item, dict) else item for key, item in redact(as_facts(config)).items() if key not in _FREE}


def _shown(score: dict[str, Any]) -> str:
    value, low, high = (score[key] for key in ("value", "low", "high"))
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _is_held_out(asked: Asked, fraction: float) -> bool:
    """By the prompt alone, as rows of a run are split."""
    digest = hashlib.sha256(_words(asked.prompt).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _words(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
