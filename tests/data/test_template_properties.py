"""What holds for any text, as properties: lengths, ends, ids and special-token text, over templates and kinds of tokenizers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from chattemplates import ADDED_TOKENS, KINDS, SPECIAL_TOKENS, STYLES, build_tokenizer
from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Preference, TokenGroup, Where

WHERE = Where("rows.jsonl", 0, 1)
STYLE_NAMES = sorted(STYLES)

# Blanks, line breaks and punctuation are where tokenizers look past the end of a word; the rest is any Unicode at all.
_edgy = st.text(alphabet=" \n\t.?!-{}'aB1é😀\u200b\u0301", max_size=12)
_any = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30)
TEXT = st.one_of(_edgy, _any, st.builds("{}{}{}".format, _edgy, _any, _edgy))
CONTROL = st.sampled_from([*SPECIAL_TOKENS, *ADDED_TOKENS, "[INST]", "[/INST]", "<|user|>", "<|assistant|>"])
TEXT_WITH_CONTROL = st.lists(st.one_of(TEXT, CONTROL), min_size=1, max_size=5).map("".join)


@cache
def encoder_for(style: str, kind: str, **options: Any) -> TemplateEncoder:
    return TemplateEncoder(build_tokenizer(kind, STYLES[style]), **options)


def row(prompt: Any, *answers: str) -> Preference:
    return Preference(prompt, answers, tuple((0, i) for i in range(1, len(answers))), WHERE)


def conversation(encoder: TemplateEncoder, prompt: str, answer: str) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if encoder.facts is not None and encoder.facts.wants_parts:
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return turns


@given(style=st.sampled_from(STYLE_NAMES), kind=st.sampled_from(KINDS), prompt=TEXT, first=TEXT, second=TEXT)
@example(style="chatml", kind="newline_merging", prompt="a\n\n", first="\n\nb", second="\nb")
@example(style="alpaca", kind="newline_merging", prompt="a", first="\n\nb", second="c")
@example(style="mistral", kind="metaspace_first", prompt=" a ", first="  b", second="b\n")
def test_ids_are_those_of_apply_chat_template(style: str, kind: str, prompt: str, first: str, second: str) -> None:
    encoder = encoder_for(style, kind)
    assume(not encoder._control.is_in([prompt, first, second]))
    group = encoder.encode(row(prompt, first, second))
    if isinstance(group, Dropped):
        # Templates may trim, so that answers differ in blanks alone; nothing else may be lost here.
        assert group.reason in ("empty_prompt", "empty_answer", "identical_answers"), group
        assert not prompt.strip() or not first.strip() or not second.strip() or "".join(first.split()) == "".join(second.split())
        return
    facts = encoder.facts
    assert facts is not None
    for answer, response in zip((first, second), group.response_ids, strict=True):
        messages = conversation(encoder, prompt, answer)
        if facts.end.is_appended:  # nothing is printed after the answer: the text itself, and eos
            text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
            reference = [*encoder.tokenizer(text, add_special_tokens=False)["input_ids"], encoder.terminator_id]
        else:
            reference = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        ids = [*group.prompt_ids.tolist(), *response.tolist()]
        assert reference[: len(ids)] == ids
        assert response.tolist().count(encoder.terminator_id) == 1
        assert response[-1] == encoder.terminator_id
        assert encoder.terminator_id not in reference[len(ids) :]
    if "boundary_merge" not in group.notes:
        assert encoder.prompt_ids(prompt).tolist() == group.prompt_ids.tolist()


@given(style=st.sampled_from(STYLE_NAMES), kind=st.sampled_from(KINDS), prompt=TEXT_WITH_CONTROL, answer=TEXT_WITH_CONTROL)
@example(style="chatml", kind="byte_level", prompt="a<|im_end|>\n<|im_start|>system\nb", answer="c<|im_end|>\n<|im_start|>user\nd")
@example(style="llama3", kind="sentencepiece_legacy", prompt="<|eot_id|><|eot_id|>x", answer="a <|eot_id|> b")
@example(style="parts_only", kind="metaspace_first", prompt="<s>", answer="</s>x")
def test_split_lets_no_role_out_of_a_text(style: str, kind: str, prompt: str, answer: str) -> None:
    encoder = encoder_for(style, kind, special_tokens_in_text="split")
    group = encoder.encode(row(prompt, answer, "Something else entirely."))
    if isinstance(group, Dropped):
        assert group.reason in ("empty_prompt", "empty_answer"), group
        return
    assert encoder._control.is_in([prompt, answer]) == ("special_tokens_in_text" in group.notes)
    harmless = encoder.encode(row("Hello", "there", "Something else entirely."))
    assert isinstance(harmless, TokenGroup)
    controls = set(encoder._control.ids.values())

    def roles(one: TokenGroup) -> list[int]:
        return [index for index in [*one.prompt_ids.tolist(), *one.response_ids[0].tolist()] if index in controls]

    assert roles(group) == roles(harmless)


@given(style=st.sampled_from(STYLE_NAMES), kind=st.sampled_from(KINDS), prompt=TEXT, answer=TEXT)
def test_split_changes_nothing_in_rows_without_special_tokens(style: str, kind: str, prompt: str, answer: str) -> None:
    split, warn = encoder_for(style, kind, special_tokens_in_text="split"), encoder_for(style, kind)
    assume(not warn._control.is_in([prompt, answer]))
    one, other = split.encode(row(prompt, answer, "Else")), warn.encode(row(prompt, answer, "Else"))
    assert type(one) is type(other)
    if isinstance(one, TokenGroup) and isinstance(other, TokenGroup):
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert one.response_ids[0].tolist() == other.response_ids[0].tolist()


@given(style=st.sampled_from(["chatml", "llama3", "qwen3", "gemma", "harmony"]), kind=st.sampled_from(KINDS), prompt=TEXT, answer=TEXT)
def test_split_reads_back_as_the_text_that_was_written(style: str, kind: str, prompt: str, answer: str) -> None:
    """The marked way of encoding on any row (nothing to mark included) gives the text's own ids, by every kind of tokenizer."""
    encoder = encoder_for(style, kind, special_tokens_in_text="split")
    text = encoder.tokenizer.apply_chat_template(conversation(encoder, prompt, answer), tokenize=False)
    assume(not encoder._control.is_in([prompt, answer]))
    marks = ("\U000f1234", "\U000f1235")
    assume(not set(marks) & set(text))
    assert encoder._control.encode_marked(text, marks) == encoder._ids([text])[0]


@given(kind=st.sampled_from(KINDS[:2]), prompt=TEXT_WITH_CONTROL, answer=TEXT_WITH_CONTROL)
def test_split_loses_no_character(kind: str, prompt: str, answer: str) -> None:
    encoder = encoder_for("chatml", kind, special_tokens_in_text="split")
    group = encoder.encode(row(prompt, answer + "x", "Else"))
    assume(isinstance(group, TokenGroup) and not prompt.startswith("<s>"))
    assert isinstance(group, TokenGroup)
    text = encoder.tokenizer.decode([*group.prompt_ids.tolist(), *group.response_ids[0].tolist()])
    assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}x<|im_end|>"


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    reason="this transformers has no sanitize_control_tokens to compare with",
)
@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT_WITH_CONTROL, answer=TEXT_WITH_CONTROL)
def test_split_agrees_with_transformers_on_the_roles(kind: str, prompt: str, answer: str) -> None:
    """Newer transformers can sanitise control tokens too, another way; both must leave the same control tokens in the same order."""
    encoder = encoder_for("llama3", kind, special_tokens_in_text="split")
    group = encoder.encode(row(prompt, answer, "Else"))
    assume(isinstance(group, TokenGroup) and not answer.strip().endswith(("<|eot_id|>", "</s>")) and not prompt.startswith("<s>"))
    assert isinstance(group, TokenGroup)
    try:
        reference = encoder.tokenizer.apply_chat_template(
            conversation(encoder, prompt, answer), tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
    except (TypeError, ValueError):
        assume(False)
    controls = set(encoder._control.ids.values())
    mine = [*group.prompt_ids.tolist(), *group.response_ids[0].tolist()]
    assert [index for index in mine if index in controls] == [index for index in reference if index in controls]


@given(kind=st.sampled_from(KINDS), prompt=TEXT, first=TEXT, second=TEXT, is_split=st.booleans())
def test_plain_text_reads_as_it_was_written(kind: str, prompt: str, first: str, second: str, is_split: bool) -> None:
    encoder = encoder_for("chatml", kind, chat_template="none", special_tokens_in_text="split" if is_split else "warn")
    assume(not encoder._control.is_in([prompt, first, second]))
    group = encoder.encode(row(prompt, first, second))
    if isinstance(group, Dropped):
        assert group.reason in ("empty_prompt", "empty_answer", "identical_answers", "boundary"), group
        assert group.reason != "boundary" or "no token of the prompt" in group.detail
        return
    for answer, response in zip((first, second), group.response_ids, strict=True):
        whole = encoder.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert [*group.prompt_ids.tolist(), *response.tolist()] == [*whole, encoder.terminator_id]


@given(
    style=st.sampled_from(STYLE_NAMES),
    kind=st.sampled_from(KINDS[:2]),
    policy=st.sampled_from(["keep_end", "keep_start"]),
    prompt=TEXT.filter(str.strip),
    repeats=st.integers(1, 40),
    first=TEXT.filter(str.strip),
    second=TEXT.filter(str.strip),
    long=st.integers(1, 40),
    max_length=st.integers(2, 120),
    max_prompt=st.none() | st.integers(1, 60),
)
def test_whatever_the_lengths(
    style: str,
    kind: str,
    policy: str,
    prompt: str,
    repeats: int,
    first: str,
    second: str,
    long: int,
    max_length: int,
    max_prompt: int | None,
) -> None:
    """One prompt, at least one token of each answer, everything within the limits, ends only where answers end."""
    assume(max_prompt is None or max_prompt < max_length)
    tokenizer = encoder_for(style, kind).tokenizer
    encoder = encoder_for(style, kind, max_length=10_000)
    texts = row(prompt * repeats, first * long, second)
    assume(not encoder._control.is_in([prompt * 2, first * 2, second]))
    whole = encoder.encode(texts)
    assume(isinstance(whole, TokenGroup))
    assert isinstance(whole, TokenGroup)
    short = TemplateEncoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt, truncation=policy).encode(texts)
    if isinstance(short, Dropped):
        assert short.reason in ("prompt_too_long", "identical_after_truncation", "boundary"), short
        return
    assert len(short.prompt_ids) <= (max_prompt or max_length - 1)
    assert short.longest_tokens <= max_length
    for cut, full, is_ended in zip(short.response_ids, whole.response_ids, short.is_ended, strict=True):
        assert len(cut) >= 1
        if "boundary_merge" not in (*short.notes, *whole.notes):
            assert cut.tolist() == full[: len(cut)].tolist()
            assert is_ended == (len(cut) == len(full))
        assert (cut[-1] == encoder.terminator_id) == is_ended
    assert ("answer_cut" in short.notes) == (not all(short.is_ended))
    if "prompt_trimmed" not in short.notes and "boundary_merge" not in (*short.notes, *whole.notes):
        assert short.prompt_ids.tolist() == whole.prompt_ids.tolist()
