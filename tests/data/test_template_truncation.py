"""The length contract: what is trimmed, in which order, and what never is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chattemplates import GEMMA, LLAMA3, STYLES, build_tokenizer
from orpo.data.chat.fit import drop_identical, prompt_budgets, trim_messages
from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Message, Preference, Text, TokenGroup, Where

WHERE = Where("rows.jsonl", 0, 1)
SYSTEM: Message = {"role": "system", "content": "S1 S2 S3"}


def turns(*contents: str) -> list[Message]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)]


def row(prompt: Text, *answers: str) -> Preference:
    return Preference(prompt, answers, ((0, 1),), WHERE)


def encode(prompt: Text, *answers: str, template: str = STYLES["chatml"], **options: Any) -> TokenGroup | Dropped:
    return TemplateEncoder(build_tokenizer("newline_merging", template), **options).encode(row(prompt, *answers))


def group_of(prompt: Text, *answers: str, **options: Any) -> TokenGroup:
    group = encode(prompt, *answers, **options)
    assert isinstance(group, TokenGroup), group
    return group


def words(messages: Any) -> int:
    """A measure for trim_messages: one token for each header and one for each word."""
    return sum(1 + len(message["content"].split()) for message in messages)


def word_spans(text: str) -> list[tuple[int, int]]:
    found, position = [], 0
    for word in text.split():
        start = text.index(word, position)
        position = start + len(word)
        found.append((start, position))
    return found


def trim(messages: list[Message], budget: int, policy: str) -> list[str] | None:
    kept = trim_messages(messages, budget, policy, words, word_spans)
    return None if kept is None else [message["content"] for message in kept]


@pytest.mark.parametrize(
    ("budget", "policy", "expected"),
    [
        # 4 tokens for the system message, 3 for each turn: 19 in all
        (19, "keep_end", ["S1 S2 S3", "a b", "c d", "e f", "g h", "i j"]),
        (18, "keep_end", ["S1 S2 S3", "e f", "g h", "i j"]),
        (12, "keep_end", ["S1 S2 S3", "i j"]),
        (7, "keep_end", ["S1 S2 S3", "i j"]),
        (6, "keep_end", ["S1 S2 S3", "j"]),
        (5, "keep_end", ["i j"]),
        (2, "keep_end", ["j"]),
        (1, "keep_end", None),
        (18, "keep_start", ["S1 S2 S3", "a b", "c d", "i j"]),
        (12, "keep_start", ["S1 S2 S3", "i j"]),
        (6, "keep_start", ["S1 S2 S3", "i"]),
        (2, "keep_start", ["i"]),
    ],
)
def test_what_goes_first(budget: int, policy: str, expected: list[str] | None) -> None:
    assert trim([SYSTEM, *turns("a b", "c d", "e f", "g h", "i j")], budget, policy) == expected


def test_a_tool_result_in_the_last_turn_is_cut_before_the_question() -> None:
    messages = [*turns("a b"), {"role": "assistant", "content": ""}, {"role": "tool", "content": "1 2 3 4 5 6"}]
    assert trim(messages, 7, "keep_start") == ["a b", "", "1 2"]
    assert trim(messages, 7, "keep_end") == ["a b", "", "5 6"]


def test_a_prefill_is_never_cut() -> None:
    messages = [*turns("a b c d", "The very long beginning of an answer")]
    assert trim(messages, 10, "keep_end") == ["d", "The very long beginning of an answer"]
    assert trim(messages, 9, "keep_end") is None


def test_a_message_is_never_cut_down_to_blanks() -> None:
    def characters(messages: Any) -> int:
        return sum(1 + len(message["content"]) for message in messages)

    def spans(text: str) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(len(text))]

    assert trim_messages(turns("abc   "), 5, "keep_end", characters, spans) == turns("c   ")
    assert trim_messages(turns("abc   "), 4, "keep_end", characters, spans) is None
    assert trim_messages(turns("   abc"), 4, "keep_start", characters, spans) is None


def test_a_conversation_that_begins_with_the_assistant() -> None:
    messages = [{"role": "assistant", "content": "x y"}, *turns("a b", "c d", "e f")]
    assert trim(messages, 9, "keep_end") == ["a b", "c d", "e f"]
    assert trim(messages, 6, "keep_start") == ["x y", "e f"]
    assert trim(messages, 3, "keep_start") == ["e f"]


@pytest.mark.parametrize(
    ("prompt", "longest", "max_length", "max_prompt", "least", "expected"),
    [
        (40, 20, 100, None, 1, []),  # all fits
        (90, 20, 100, None, 1, [80, 89, 90]),  # the prompt makes room for the answer
        (90, 80, 100, None, 1, [50, 74, 90]),  # but keeps half
        (40, 90, 100, None, 1, []),  # a short prompt stays whole, the answer is cut
        (90, 20, 100, 30, 1, [30]),  # as much as is allowed
        (20, 90, 100, 30, 1, []),
        (200, 5, 100, None, 3, [95, 96, 97]),  # room for what an answer must keep
    ],
)
def test_how_much_of_a_prompt_is_kept(
    prompt: int, longest: int, max_length: int, max_prompt: int | None, least: int, expected: list[int]
) -> None:
    assert prompt_budgets(prompt, longest, max_length, max_prompt, least) == expected


def test_drop_is_the_default_and_takes_the_whole_group() -> None:
    short, long = "no", "wait " * 40
    group = encode("Hello", short, long, max_length=40)
    assert isinstance(group, Dropped)
    assert group.reason == "too_long"
    assert "max_length is 40" in group.detail
    dropped = encode("wait " * 40, short, "yes", max_length=40)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "prompt_too_long"


def test_exactly_max_length_fits() -> None:
    whole = group_of("Hello there", "Yes, you.", "no")
    same = group_of("Hello there", "Yes, you.", "no", max_length=whole.longest_tokens)
    assert same.is_ended == (True, True)
    one_less = encode("Hello there", "Yes, you.", "no", max_length=whole.longest_tokens - 1)
    assert isinstance(one_less, Dropped)
    trimmed = group_of("Hello there", "Yes, you.", "no", max_length=len(whole.prompt_ids) + 2, truncation="keep_end")
    assert trimmed.longest_tokens <= len(whole.prompt_ids) + 2


def test_max_prompt_length_is_kept_to() -> None:
    whole = group_of("one two three four five six", "Yes", "no")
    limit = len(whole.prompt_ids) - 2
    assert isinstance(encode("one two three four five six", "Yes", "no", max_prompt_length=limit), Dropped)
    trimmed = group_of("one two three four five six", "Yes", "no", max_prompt_length=limit, truncation="keep_start")
    assert len(trimmed.prompt_ids) <= limit
    assert trimmed.notes == ("prompt_trimmed",)
    assert trimmed.is_ended == (True, True)


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "zephyr", "no_generation_prompt", "qwen3"])
@pytest.mark.parametrize("policy", ["keep_end", "keep_start"])
def test_headers_stay_whole(style: str, policy: str) -> None:
    """A trimmed prompt is what the template makes of a shorter conversation: it differs from the full one in the contents alone."""
    encoder = TemplateEncoder(build_tokenizer("newline_merging", STYLES[style]), max_length=60, truncation=policy)
    prompt = "first " + "then " * 80 + "last"
    group = encoder.encode(row(prompt, "Yes, you.", "wait " * 50))
    assert isinstance(group, TokenGroup)
    text = encoder.tokenizer.decode(group.prompt_ids)
    empty = encoder.tokenizer.decode(encoder.prompt_ids("@"))
    before, after = empty.split("@")
    assert text.startswith(before)
    assert text.endswith(after)
    content = text.removeprefix(before).removesuffix(after)
    assert prompt.endswith(content) if policy == "keep_end" else prompt.startswith(content)
    np.testing.assert_array_equal(encoder.prompt_ids(content), group.prompt_ids)


def test_a_long_answer_leaves_the_short_one_alone() -> None:
    whole = group_of("Hello", "Yes, you.", "wait " * 100)
    cut = group_of("Hello", "Yes, you.", "wait " * 100, max_length=40, truncation="keep_end")
    assert cut.response_ids[0].tolist() == whole.response_ids[0].tolist()
    assert cut.is_ended == (True, False)
    assert cut.response_ids[1].tolist() == whole.response_ids[1].tolist()[: len(cut.response_ids[1])]
    assert cut.longest_tokens == 40


def test_an_answer_keeps_a_token_of_its_own_after_the_templates_think_block() -> None:
    template = STYLES["qwen3"]
    encoder = TemplateEncoder(build_tokenizer("newline_merging", template), max_length=24, max_prompt_length=23, truncation="keep_end")
    group = encoder.encode(row("word " * 40, "Yes, you there.", "no"))
    assert isinstance(group, TokenGroup)
    text = encoder.tokenizer.decode(group.response_ids[0])
    assert text.startswith("<think>\n\n</think>\n\nY")
    assert not group.is_ended[0]


def test_too_small_for_the_headers_drops() -> None:
    dropped = encode("Hello there", "Yes", "no", template=LLAMA3, max_length=8, truncation="keep_end")
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "prompt_too_long"
    assert "header" in dropped.detail


def test_the_system_message_is_kept_and_old_exchanges_go() -> None:
    tokenizer = build_tokenizer("newline_merging", STYLES["chatml"])
    prompt = ({"role": "system", "content": "Be short."}, *turns("old question " * 8, "old answer " * 8, "new question"))
    full = TemplateEncoder(tokenizer).encode(row(prompt, "Yes", "no"))
    assert isinstance(full, TokenGroup)
    encoder = TemplateEncoder(tokenizer, max_length=full.longest_tokens - 1, truncation="keep_end")
    group = encoder.encode(row(prompt, "Yes", "no"))
    assert isinstance(group, TokenGroup)
    assert tokenizer.decode(group.prompt_ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nnew question<|im_end|>\n<|im_start|>assistant\n"
    )


def test_alternation_survives_trimming() -> None:
    """Gemma's template raises if roles do not alternate, so a trim that left a lone assistant turn would show here."""
    contents = [f"{name} " * 10 for name in "abcdefg"]
    for policy in ("keep_end", "keep_start"):
        for max_length in range(30, 150, 7):
            group = encode(tuple(turns(*contents)), "Yes", "no", template=GEMMA, max_length=max_length, truncation=policy)
            assert isinstance(group, TokenGroup), group
            assert group.longest_tokens <= max_length


def test_plain_text_prompts_lose_tokens_on_one_side() -> None:
    tokenizer = build_tokenizer(template=None)
    prompt = "one two three four five six seven eight nine ten"
    whole = TemplateEncoder(tokenizer).encode(row(prompt, " Yes", " no"))
    assert isinstance(whole, TokenGroup)
    for policy, expected in (("keep_end", whole.prompt_ids[-6:]), ("keep_start", whole.prompt_ids[:6])):
        group = TemplateEncoder(tokenizer, max_prompt_length=6, truncation=policy).encode(row(prompt, " Yes", " no"))
        assert isinstance(group, TokenGroup)
        assert group.prompt_ids.tolist() == expected.tolist()
        assert [ids.tolist() for ids in group.response_ids] == [ids.tolist() for ids in whole.response_ids]
        assert group.notes == ("prompt_trimmed",)


@pytest.mark.parametrize("num_words", [60, 200_000])
def test_rendered_prompts_are_not_trimmed(num_words: int) -> None:
    tokenizer = build_tokenizer()
    rendered = tokenizer.apply_chat_template(turns("wait " * num_words), tokenize=False, add_generation_prompt=True)
    dropped = TemplateEncoder(tokenizer, max_length=40, truncation="keep_end").encode(row(rendered, "Yes", "no"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "prompt_too_long"
    assert "rendered before" in dropped.detail


@pytest.mark.parametrize("policy", ["drop", "keep_end", "keep_start"])
@pytest.mark.parametrize("template", [None, STYLES["chatml"]])
def test_huge_texts_take_bounded_time(policy: str, template: str | None) -> None:
    encoder = TemplateEncoder(build_tokenizer(template=template), max_length=64, truncation=policy)
    huge = "word " * 2_000_000
    for prompt, answers in ((huge, (" Yes", " no")), ("Hello", (" Yes", huge))):
        group = encoder.encode(row(prompt, *answers))
        if policy == "drop":
            assert isinstance(group, Dropped)
            assert group.reason == ("prompt_too_long" if prompt == huge else "too_long")
        else:
            assert isinstance(group, TokenGroup)
            assert group.longest_tokens <= 64
            assert group.notes == (("prompt_trimmed",) if prompt == huge else ("answer_cut",))
            assert group.is_ended == (True, prompt == huge)


def test_drop_identical() -> None:
    same = {(0, 1), (2, 3)}
    assert drop_identical(((0, 1), (2, 0), (2, 3)), lambda i, j: (i, j) in same) == (((1, 0),), (0, 2))
    assert drop_identical(((0, 1),), lambda i, j: True) == ((), ())
