"""A first configuration for somebody's model and data, from what can be found out about both. No weights are loaded.

What is looked at: the rows (their shape, whether there are test rows, how long they are as the model sees them), the model (its size,
whether it has a chat template, how long a text it takes) and the machine's memory. `orpo init` writes the outcome as commented YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orpo.config.advice import advice_for
from orpo.data.types import Preference
from orpo.errors import DataError, UserError
from orpo.run.config import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orpo.data.types import Dropped, TokenGroup
    from orpo.run.config import RunConfig
    from orpo.training.planning import Plan

SAMPLE_ROWS = 500
ROWS_PER_STEP = 8
HELD_OUT_ROWS = 100
"""Held-out pairs aimed at where the data has no test rows: with fewer an interval says little."""
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
_MEMORY_SHARE = 0.85
"""Of the free memory that a plan may fill; the rest is what an estimate can be wrong by."""


@dataclass(frozen=True, slots=True)
class Line:
    """One key of the file, and why it has that value. A key without a value is a comment alone."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True, slots=True)
class FirstRows:
    """What the first rows of the data say.

    Attributes:
        shape: the shape's name and the columns taken for what.
        num_rows: all rows where they were few enough to count, else None.
        has_test: whether the data has test rows of its own.
        rows: those that were looked at.
    """

    shape: str
    num_rows: int | None
    has_test: bool
    rows: list[Preference]


def look_at_data(source: Any) -> FirstRows:
    """The first rows of a source.

    Raises:
        UserError: it cannot be read, or none of its first rows can be used.
    """
    from orpo.data.formats import Stream, nothing_left, to_preference
    from orpo.data.reading.sources import as_sources

    (place,) = as_sources(source)
    stream = Stream(place, pairs="best_worst", sft_rows=False, streaming=True)
    judged = [to_preference(row, stream.shape, where) for where, row in islice(stream, SAMPLE_ROWS + 1)]
    rows = [item for item in judged if isinstance(item, Preference)]
    if not rows:
        raise nothing_left([item for item in judged if not isinstance(item, Preference)], place.label)
    return FirstRows(str(stream.shape), len(judged) if len(judged) <= SAMPLE_ROWS else None, _has_test(source), rows[:SAMPLE_ROWS])


def _has_test(source: Any) -> bool:
    """Whether it has test rows beside those to train on: of a file that is called pairs-test.jsonl they are all there is."""
    from orpo.data.formats import stream_preferences

    try:
        trained, tested = (next(iter(stream_preferences(source, split=split)), None) for split in (None, "test"))
    except DataError:
        return False
    return trained is not None and tested is not None and trained.where != tested.where


def starter(model: str, source: str, *, revision: str | None = None) -> list[Line]:
    """The lines of a first configuration.

    Raises:
        UserError: the model or the data cannot be read.
    """
    from orpo.models.load import load_tokenizer

    sample = look_at_data(source)
    tokenizer = load_tokenizer(model, revision=revision)
    is_base = not getattr(tokenizer, "chat_template", None)
    named = [f"--model_name_or_path={model}", f"--dataset_name={source}", *([f"--model_revision={revision}"] if revision else [])]
    if is_base:
        named.append("--chat_template=chatml")
    groups, longest = _tokenise(sample.rows, tokenizer, chat_template="chatml" if is_base else None)
    length = _length_for(longest, resolve(None, named))
    named.append(f"--max_length={length}")
    fit = _fit_to_memory(named, groups)
    lines = [Line("model_name_or_path", model, f"{fit.plan.num_parameters / 1e6:,.0f} M parameters")]
    lines += [Line("model_revision", revision)] if revision else []
    lines += [Line("dataset_name", source, f"recognised as {sample.shape}"), _held_out(sample)]
    if is_base:
        lines.append(Line("chat_template", "chatml", "the tokenizer has no template; ORPO needs no SFT run before it"))
    lines += _objective_lines(fit)
    why = f"the longest of the first {len(sample.rows)} rows has {longest:,} tokens (prompt and longer answer)"
    lines.append(Line("max_length", length, why + ("" if longest <= length else "; longer ones are dropped, counted and shown")))
    if longest > length:
        lines.append(Line("truncation", "keep_end", "cuts long prompts at their start instead of dropping the row; no answer is emptied"))
    return [*lines, *_keeping_lines(is_small=sample.num_rows is not None)]


def _tokenise(rows: Sequence[Preference | Dropped], tokenizer: Any, *, chat_template: str | None) -> tuple[list[TokenGroup], int]:
    """The rows as the model sees them, and the tokens of the longest prompt with its longer answer."""
    from orpo.data.dataset import prepare_groups
    from orpo.data.template import TemplateEncoder

    groups, report = prepare_groups(rows, TemplateEncoder(tokenizer, chat_template=chat_template, max_length=1 << 20))
    if not groups:
        reasons = ", ".join(line.strip() for line in report.histogram())
        raise UserError(
            f"none of the first rows can be trained on: {reasons}", where="data", mend="orpo preview shows a row token by token"
        )
    return groups, max(len(group.prompt_ids) + max(len(ids) for ids in group.response_ids) for group in groups)


def _length_for(longest: int, config: RunConfig) -> int:
    from orpo.models.newtokens import positions_of
    from orpo.run.config import read_model_config

    most = positions_of(read_model_config(config)) or _LENGTHS[-1]
    return next((length for length in _LENGTHS if length >= min(longest, 2048) and length <= most), min(2048, most))


@dataclass(frozen=True, slots=True)
class _Fit:
    """What fits the machine: all weights or an adapter, and rows at once."""

    plan: Plan
    is_lora: bool
    batch: int
    has_checkpointing: bool
    device: str
    free_bytes: int | None


def _fit_to_memory(named: list[str], groups: Sequence[TokenGroup]) -> _Fit:
    """The first that is expected to fit: all weights, an adapter, an adapter with recomputed activations; each with fewer rows at once."""
    from orpo.system.machine import memory_facts
    from orpo.training.planning import make_plan, packed_lengths

    ways = [(*way, batch) for way in ((False, False), (True, False), (True, True)) for batch in (8, 4, 2, 1)]
    for is_lora, has_checkpointing, batch in ways:
        flags = [*named, f"--per_device_train_batch_size={batch}", f"--gradient_accumulation_steps={ROWS_PER_STEP // batch}"]
        flags += ["--use_peft=true"] * is_lora + ["--gradient_checkpointing=true"] * has_checkpointing
        config = resolve(None, flags)
        args = config.training_args()
        plan = make_plan(config, args, **packed_lengths(groups, args))
        free = memory_facts(args.device)["free_bytes"]
        fit = _Fit(plan, is_lora, batch, has_checkpointing, str(args.device), free)
        if free is None or plan.memory_bytes <= _MEMORY_SHARE * free:
            break
    return fit  # the smallest, where none is expected to fit: the file says what it would need


def _held_out(sample: FirstRows) -> Line:
    if sample.has_test:
        return Line("dataset_test_split", "test", "the data's own test rows, to see what training gained")
    share = 0.1 if sample.num_rows is None else max(0.1, min(0.3, round(HELD_OUT_ROWS / sample.num_rows, 2)))
    many = f" of {sample.num_rows} rows" if sample.num_rows is not None else ""
    return Line("eval_fraction", share, f"held out by prompt{many}: no test rows were found, and what is not measured is not known")


def _objective_lines(fit: _Fit) -> list[Line]:
    from orpo.system.console import human_bytes

    advice = advice_for(fit.plan.num_parameters)
    free = f" of {human_bytes(fit.free_bytes)} free" if fit.free_bytes else ""
    need = f"an estimated {human_bytes(fit.plan.memory_bytes)}{free} on {fit.device}; orpo check measures a step"
    lines = [
        Line("orpo_alpha", advice.orpo_alpha, f"lambda, the weight of the odds-ratio term. Source: {advice.alpha_source}"),
        Line("learning_rate", advice.rate(is_lora=fit.is_lora), f"Source: {advice.source_of_rate(is_lora=fit.is_lora)}"),
        Line("num_train_epochs", 2, "the packaged demo's; the paper went up to 10, the best by evaluation loss"),
    ]
    if fit.is_lora:
        lines += [
            Line("use_peft", True, "a LoRA adapter: training all weights would not fit"),
            Line("lora_r", 16, "the default"),
            Line("lora_alpha", 32, "the default, twice the rank"),
        ]
    lines += [
        Line("per_device_train_batch_size", fit.batch, f"memory: {need}"),
        Line(
            "gradient_accumulation_steps",
            ROWS_PER_STEP // fit.batch,
            f"{ROWS_PER_STEP} rows a step, however memory splits them",
        ),
    ]
    if fit.has_checkpointing:
        lines.append(Line("gradient_checkpointing", True, "computes activations again instead of keeping them"))
    return lines


def _keeping_lines(*, is_small: bool) -> list[Line]:
    every: list[Line] = (
        [Line("eval_strategy", "epoch"), Line("save_strategy", "epoch", "the same command again goes on from the newest checkpoint")]
        if is_small
        else [
            Line("eval_strategy", "steps"),
            Line("eval_steps", 200),
            Line("save_strategy", "steps"),
            Line("save_steps", 200, "the same command again goes on from the newest checkpoint"),
        ]
    )
    return [*every, Line("save_total_limit", 2), Line("logging_steps", 5)]


def as_yaml(lines: Sequence[Line], *, path: str) -> str:
    """The lines as a file, with each reason above its key."""
    import textwrap

    out = [
        "# Written by `orpo init` from this model, this data and this machine. Change what you know better.",
        f"#   orpo check {path}     what would go wrong, and one real step",
        f"#   orpo train {path}     the same command again resumes",
    ]
    for line in lines:
        if line.why:
            out += ["", *(f"# {piece}" for piece in textwrap.wrap(line.why, 118))]
        out.append(_entry(line))
    return "\n".join(out) + "\n"


def _entry(line: Line) -> str:
    """`key: value` as YAML reads it back; floats with a point, since YAML takes 5e-05 for text."""
    if isinstance(line.value, float):
        text = f"{line.value:.1e}" if line.value < 1e-3 else repr(line.value)
        return f"{line.key}: {text}"
    return yaml.safe_dump({line.key: line.value}, allow_unicode=True, width=1000).rstrip("\n")


def write_starter(path: Path, text: str) -> None:
    """Write the file; one that is there stays.

    Raises:
        UserError: it is there, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("is there already", where=str(path), mend="name another file with --out, or remove it") from None
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path), mend="name another file with --out") from error
