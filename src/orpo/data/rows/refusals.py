"""Why a source cannot be used as preferences, and what it would need (the errors that concern a whole source)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.rows import shapes
from orpo.data.rows.columns import (
    ANSWERS,
    CHOSEN,
    PAIR_EXAMPLE,
    PROMPTS,
    RATINGS,
    REJECTED,
    Sample,
    is_number,
    normal_name,
    prompt_reader,
    verdict_on_one_answer,
)
from orpo.data.rows.messages import BadRow, looks_like_messages, read_text_or_messages
from orpo.errors import DataError


def map_hint(sample: Sample, ours: str, names: Sequence[str], taken: Sequence[str | None]) -> str:
    free = [column for column in sample.columns if column not in taken]
    near = [close for name in names[:3] for close in difflib.get_close_matches(name, free, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]!r}? Then set column_map: {{{ours}: {near[0]}}}"
    likely = [column for column in free if ours == "prompt" or column.lower() not in PROMPTS]
    return f"add the column, or name the one that holds it, for example column_map: {{{ours}: {likely[0] if likely else '…'}}}"


def no_prompt(sample: Sample, taken: Sequence[str]) -> DataError:
    """Answers, and no column that holds what they answer."""
    return sample.error(
        "no column for the prompt",
        expected=f"{PAIR_EXAMPLE}, or the prompt inside both answers as messages",
        mend=map_hint(sample, "prompt", PROMPTS, taken),
    )


def unlabelled(sample: Sample, columns: Sequence[str], *, is_list: bool = False) -> DataError:
    """Several responses per prompt without a verdict; `is_list`: they stand in one column."""
    if is_list:
        return sample.error(
            f"several responses per prompt in {columns[0]!r}, and nothing that says which is better",
            expected="a list of scores or ranks beside them, a score in each, or a column with the number of the best",
            mend="add the verdicts. Where the order is the verdict, the best first: "
            f"column_map: {{chosen: {columns[0]}.0, rejected: {columns[0]}.1}}",
        )
    return sample.error(
        f"{len(columns)} responses per prompt, and nothing that says which is better",
        expected="a winner or label column, one vote column per annotator, or a score for each response",
        mend="add the verdicts (for example a column 'winner' with the name of the better response), or columns chosen and rejected",
    )


_BAD_WORDS = frozenset(
    [
        *("rejected", "reject", "dispreferred", "undesirable", "negative", "bad", "worse", "worst"),
        *("loser", "losing", "lose", "incorrect", "wrong"),
    ]
)
_GOOD_WORDS = frozenset(
    {"chosen", "accepted", "preferred", "positive", "good", "better", "best", "winner", "winning", "win", "correct", "right", "desirable"}
)


def second_answers(sample: Sample) -> tuple[str, str] | None:
    """(good, bad): two columns of texts whose names differ in a word for good and bad (`text` and `rejected_text`, `good`, `bad`)."""
    texts = [c for c in sample.columns if sample.share(c, lambda value: isinstance(value, str) or looks_like_messages(value)) > 0.5]
    words = {column: frozenset(normal_name(column).split("_")) for column in texts}
    for bad in texts:
        if words[bad] & _BAD_WORDS:
            rest = words[bad] - _BAD_WORDS
            good = next((c for c in texts if not words[c] & _BAD_WORDS and words[c] - _GOOD_WORDS == rest), None)
            if good is not None:
                return good, bad
    return None


def refuse_second_answers(sample: Sample) -> None:
    """Stop at rows whose second answer goes by a name of its own: one answer of two would be trained, and nobody told.

    Raises:
        DataError: there are two such columns.
    """
    found = second_answers(sample)
    if found is not None:
        raise sample.error(
            f"two answers to each prompt, it seems: {found[0]!r} and {found[1]!r}",
            expected=PAIR_EXAMPLE,
            mend=f"column_map: {{chosen: {found[0]}, rejected: {found[1]}}}; or leave the column {found[1]!r} out of the data",
        )


def refuse_objects(sample: Sample, reader: Any) -> None:
    """Stop at a column of objects where text or messages are needed: every row would be dropped, and nobody told how to reach in.

    Raises:
        DataError: most values of the prompt or of an answer are objects that are neither.
    """
    pair = [(name, getattr(reader, name, None)) for name in ("chosen", "rejected")]
    several = [("a response", column) for column in getattr(reader, "responses", ())]
    prompt = getattr(reader, "prompt", None)
    for name, column in [("prompt", next(iter(prompt.columns), None) if prompt else None), *pair, *several]:
        if column is None or sample.share(column, _is_unreadable) <= 0.5:
            continue
        value = next(value for value in sample.values(column) if _is_unreadable(value))
        texts = [key for key, item in value.items() if isinstance(item, str) or looks_like_messages(item)]
        best = max(texts, key=lambda key: len(str(value[key])), default="…")
        ours = "prompt" if name == "prompt" else name if name != "a response" else column
        raise sample.error(
            f"{column!r} holds objects with {', '.join(map(repr, value))}, not text or messages",
            expected=f"the text itself as {name}",
            mend=f"name the part that holds it: column_map: {{{ours}: {column}.{best}}}",
        )


def _is_unreadable(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        read_text_or_messages(value, "the value")
    except BadRow:
        return True
    return False


def refusal(sample: Sample) -> DataError:
    """Why a source without pairs cannot be used, and what it would need."""
    prompt, answer = prompt_reader(sample), next((c for n in ANSWERS if (c := sample.find((n,)))), None)
    label = verdict_on_one_answer(sample) or next(
        (c for n in RATINGS if (c := sample.find((n,))) and sample.share(c, is_number) > 0.5), None
    )
    if label is not None and answer is not None:
        return _unpaired(sample, answer, label)
    missing = {name: _near_column(sample, names) for name, names in (("chosen", CHOSEN), ("rejected", REJECTED))}
    if all(missing.values()):
        hint = ", ".join(f"{ours}: {theirs}" for ours, theirs in missing.items())
        return sample.error(
            "no columns for the chosen and the rejected answer",
            expected=PAIR_EXAMPLE,
            mend=f"did you mean these? Then set column_map: {{{hint}}}",
        )
    if answer is not None and sample.share(answer, _holds_several) > 0.5:
        return unlabelled(sample, [answer], is_list=True)
    free = [c for c in sample.columns if c not in prompt.columns and sample.share(c, lambda value: isinstance(value, str)) > 0.5]
    talks = answer is not None and any(looks_like_messages(value) for value in sample.values(answer))
    if answer is not None and not talks and not set(prompt.columns) - {answer}:
        return sample.error(
            f"plain text in {answer!r}, and nothing that says where a prompt ends and its answer begins",
            expected=PAIR_EXAMPLE,
            mend="write prompt and answers into columns of their own",
        )
    if answer is not None and (answer not in prompt.columns or talks):
        return sample.error(
            f"instruction-only rows: one answer per prompt ({answer!r}) and none to reject",
            expected=f"two answers to the same prompt, the better one marked: {PAIR_EXAMPLE}",
            mend="add a rejected answer to each row, or mix these rows in as SFT-only rows (next-token loss, no odds-ratio term) with "
            "sft_rows: true",
        )
    if prompt.columns:
        example = f" If two columns hold them: column_map: {{chosen: {free[0]}, rejected: {free[1]}}}" if len(free) > 1 else ""
        return sample.error(
            "prompts without answers",
            expected=f"two answers to each prompt: {PAIR_EXAMPLE}",
            mend=f"add the columns chosen and rejected.{example}",
        )
    return sample.error(
        "no columns that hold a prompt and two answers",
        expected=PAIR_EXAMPLE,
        mend="name the columns, for example column_map: {prompt: question, chosen: good, rejected: bad}",
    )


def _holds_several(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(item, str) for item in value)


def _near_column(sample: Sample, names: Sequence[str]) -> str | None:
    near = [close for name in names for close in difflib.get_close_matches(name, sample.columns, n=1, cutoff=0.75)]
    return near[0] if near else None


_MANY_ROWS = 100
"""Of a sample, which may then be the beginning of a larger file."""


def _unpaired(sample: Sample, answer: str, label: str) -> DataError:
    """One answer per row and a verdict on it (KTO): what of that can be paired, and how."""
    num_both, num_prompts = _pairable(sample, answer, label)
    mends = ["add a second answer to each prompt (for instance from another model)", "train the good rows alone with sft_rows: true"]
    # Where all good answers come before all bad ones, the first rows show none that go together.
    if (num_both or len(sample.rows) >= _MANY_ROWS) and sample.share(label, lambda value: isinstance(value, bool) or is_number(value)) == 1:
        mends.insert(0, f"pair the answers of each prompt, wherever its rows stand, with column_map: {{score: {label}}}")
    return sample.error(
        f"unpaired rows (KTO): one answer per row with the verdict {label!r}, "
        f"and {num_both} of {num_prompts} prompts {f'of the first {len(sample.rows)} rows ' if num_both < num_prompts else ''}"
        "with answers of both kinds",
        expected=f"two answers to the same prompt, the better one marked: {PAIR_EXAMPLE}",
        mend=", or ".join(mends),
    )


def _pairable(sample: Sample, answer: str, label: str) -> tuple[int, int]:
    """(prompts of the sample with a good and a bad answer, prompts)."""
    prompt = prompt_reader(sample, taken=(answer,))
    labels: dict[str, set[str]] = {}
    for row in sample.rows:
        try:
            key = repr(prompt.read(row)) if prompt.columns else repr(shapes.read_sft(prompt, row, row.get(answer)).prompt)
        except BadRow:
            continue
        labels.setdefault(key, set()).add(repr(row.get(label)))
    return sum(len(kinds) > 1 for kinds in labels.values()), len(labels)
