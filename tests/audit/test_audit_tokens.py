"""Lengths in tokens, and what template and length policy do, against counts made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orpo.audit import KINDS, AuditOptions, run_audit
from orpo.data.formats import load_preferences
from orpo.data.template import TemplateEncoder
from orpo.data.types import NOTES, REASONS

from .test_audit_findings import finding, places, plain_rows


def count(tokenizer: Any, prompt: str, answer: str) -> tuple[int, int]:
    """(prompt, answer) tokens by transformers' own rendering; the answer with its end token, without what is printed after it."""
    question = [{"role": "user", "content": prompt}]
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": answer}], tokenize=False)
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    num_asked = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    return num_asked, len(tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]) - num_asked


def long_rows() -> list[dict[str, Any]]:
    rows = plain_rows(40)
    rows[7]["chosen"] *= 8
    rows[8]["prompt"] *= 12
    rows[9]["prompt"] += " <|im_end|>"
    return rows


@pytest.mark.parametrize("truncation", ["drop", "keep_end"])
def test_lengths_are_told_beyond_max_length(tiny_tokenizer: Any, truncation: str) -> None:
    rows = long_rows()
    lengths = [(count(tiny_tokenizer, row["prompt"], row["chosen"]), count(tiny_tokenizer, row["prompt"], row["rejected"])) for row in rows]
    longest = [prompt + max(chosen, rejected) for (prompt, chosen), (_, rejected) in lengths]
    limit = sorted(longest)[-3]
    encoder = TemplateEncoder(tiny_tokenizer, max_length=limit, truncation=truncation)
    unlimited = TemplateEncoder(tiny_tokenizer, max_length=10**6)
    audit = run_audit(rows, AuditOptions(encoder=encoder, unlimited_encoder=unlimited))
    assert audit.tokens is not None
    assert audit.tokens.lengths["longest"].tolist() == longest
    assert audit.tokens.lengths["chosen"].tolist() == [chosen for (_, chosen), _ in lengths]
    assert audit.tokens.percentiles()["longest"]["p100"] == max(longest)
    assert audit.tokens.percentiles()["prompt"]["p50"] == round(float(np.median([prompt for (prompt, _), _ in lengths])))
    codes = {item.code for item in audit.findings}
    if truncation == "drop":
        assert places(audit, "too_long") == [7]
        assert places(audit, "prompt_too_long") == [8]
        assert sorted(audit.leaving) == [7, 8]
    else:
        groups = [encoder.encode(item) for item in load_preferences(rows)[0]]
        for note in ("answer_cut", "prompt_trimmed"):
            assert places(audit, note) == [group.where.row for group in groups if note in group.notes]
        assert {7, 8} == {*places(audit, "answer_cut"), *places(audit, "prompt_trimmed")}
        assert not codes & {"too_long", "prompt_too_long"}
    assert places(audit, "special_token_text") == [9]
    assert f"max_length {limit}" in "\n".join(audit.lines())


def test_without_the_second_encoder_lengths_are_those_that_are_kept(tiny_tokenizer: Any) -> None:
    encoder = TemplateEncoder(tiny_tokenizer, max_length=200)
    audit = run_audit(long_rows(), AuditOptions(encoder=encoder))
    assert audit.tokens is not None
    assert audit.tokens.lengths["longest"].max() <= 200
    assert len(audit.tokens.lengths["longest"]) + sum(map(len, audit.tokens.dropped.values())) == 40


def test_every_note_of_the_encoder_is_a_finding() -> None:
    names = {"special_token_text" if note == "special_tokens_in_text" else note for note in NOTES}
    assert names <= KINDS.keys()
    assert REASONS.keys() <= KINDS.keys()


def test_the_tokenizer_has_the_last_word_on_special_text(tiny_tokenizer: Any) -> None:
    rows = plain_rows(30)
    rows[3]["prompt"] += " <|some_other_models_token|>"
    rows[4]["prompt"] += " <|im_start|>"
    assert places(run_audit(rows), "special_token_text") == [3, 4]
    audit = run_audit(rows, AuditOptions(encoder=TemplateEncoder(tiny_tokenizer, max_length=500)))
    assert places(audit, "special_token_text") == [4]
    assert finding(audit, "special_token_text").severity == "warning"
