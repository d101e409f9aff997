"""What templates do to rows, one kind at a time: what they swallow, how they end, what they were given rendered."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from chatcorpus import all_templates, corpus_tokenizer
from chatgrid import CALL, TOLD, TOOLS, assistant, is_in, user
from chattemplates import build_tokenizer
from orpo.data.dataset import prepare_groups
from orpo.data.formats import stream_preferences
from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Preference, TokenGroup, Where
from orpo.errors import DataError, UserError

WHERE = Where("rows.jsonl", 0, 1)


@cache
def encoder_for(name: str, **options: Any) -> TemplateEncoder:
    return TemplateEncoder(corpus_tokenizer(name), max_length=100_000, **options)


def row(prompt: Any, *answers: Any, **options: Any) -> Preference:
    return Preference(prompt, answers, ((0, 1),) if len(answers) > 1 else (), WHERE, **options)


def group_of(encoder: TemplateEncoder, preference: Preference) -> TokenGroup:
    group = encoder.encode(preference)
    assert isinstance(group, TokenGroup), group
    return group


def texts_of(encoder: TemplateEncoder, group: TokenGroup) -> tuple[str, list[str]]:
    decode = encoder.tokenizer.decode
    return decode(group.prompt_ids), [decode(ids) for ids in group.response_ids]


# What a row holds is trained or told.

WORDS = st.text(alphabet="abcdefghij ", min_size=4, max_size=14).map(lambda text: "w" + "".join(text.split()))
ARGUMENTS = st.recursive(
    WORDS | st.integers(1000, 99999),
    lambda inner: st.dictionaries(WORDS, inner, min_size=1, max_size=2) | st.lists(inner, min_size=1, max_size=2),
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Preference, dict[str, list[str]]]:
    """A row with its words: those of the answer itself, and all others."""
    own, others = [], []

    def word(into: list[str]) -> str:
        into.append(draw(WORDS))
        return into[-1]

    def call(into: list[str]) -> dict[str, Any]:
        arguments = draw(st.dictionaries(WORDS, ARGUMENTS, min_size=1, max_size=2))
        into += leaves(arguments)
        return {"type": "function", "id": "call00001", "function": {"name": word(into), "arguments": arguments}}

    messages = [{"role": "system", "content": word(others)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [user(word(others)), assistant(word(others), **({"reasoning_content": word(others)} if draw(st.booleans()) else {}))]
    name = {"name": word(others)} if draw(st.booleans()) else {}
    messages.append({**user(word(others)), **name})
    tools = None
    if draw(st.booleans()):
        function = {"name": word(others), "description": word(others), "parameters": {"type": "object", "properties": {}}}
        tools = ({"type": "function", "function": function},)
    answer = assistant(word(own) if draw(st.booleans()) else "")
    if draw(st.booleans()):
        answer["reasoning_content"] = word(others)
    if not answer["content"] or draw(st.booleans()):
        answer["tool_calls"] = [call(own)]
    return Preference(tuple(messages), ((answer,),), (), WHERE, tools), {"own": own, "others": others}


def leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [str(value)]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(all_templates())), drawn=conversations())
def test_every_word_of_a_row_is_trained_or_told(name: str, drawn: tuple[Preference, dict[str, list[str]]]) -> None:
    encoder, (preference, words) = encoder_for(name), drawn
    result = encoder.encode(preference)
    if isinstance(result, Dropped):
        assert result.reason in ("not_printed", "template_failed", "boundary"), result
        return
    prompt, (answer,) = texts_of(encoder, result)
    assert all(is_in(word, answer) for word in words["own"]), answer
    assert all(is_in(word, prompt + answer) for word in words["others"]) or TOLD & set(result.notes), result.notes


@pytest.mark.parametrize("name", ["llama3", "chatml_blank_before", "chatml", "calls_never"])
def test_a_call_that_is_not_printed_drops_the_row(name: str) -> None:
    """Else "One moment." would be trained against "A moment.", which nobody preferred; or a blank against a blank."""
    other = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    template = encoder_for("chatml_trims" if name == "llama3" else name)
    for first, second in (("One moment.", "A moment."), ("", "")):
        answers = [(assistant(text, tool_calls=[made]),) for text, made in ((first, CALL), (second, other))]
        dropped = template.encode(row("Weather?", *answers, tools=TOOLS))
        assert isinstance(dropped, Dropped)
        assert dropped.reason == "not_printed"
        assert "a tool call" in dropped.detail


def test_an_answer_of_reasoning_alone_that_is_taken_out_drops_the_row() -> None:
    dropped = encoder_for("distilled").encode(row("Hello", "<think>\nBecause.\n</think>", "No."))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "not_printed"


def test_what_is_left_out_is_counted_and_shown() -> None:
    rows = [row("Weather?", (assistant("Wet.", reasoning_content="Clouds."),), "Dry.", tools=TOOLS)] * 3
    _, report = prepare_groups(rows, encoder_for("chatml"))
    assert report.notes["reasoning_not_printed"] == report.notes["tools_not_printed"] == 3
    assert sum("3 of 3 rows: the chat template leaves out" in text for text in report.warnings()) == 2


# Ends.


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("response_wrapped", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("chatml_wrapped", "<|close|><|im_end|>"),
        ("end_then_eos", "<|end|>"),
        ("channels", "<|return|>"),
        ("observation", "</s>"),
        ("inst_sys", " </s>"),
    ],
)
def test_where_an_answer_ends(name: str, ending: str) -> None:
    encoder = encoder_for(name)
    _, (answer, _) = texts_of(encoder, group_of(encoder, row("Hello", "Quite so.", "No.")))
    assert answer.endswith("Quite so." + ending)
    # An answer that brings its end along ends once.
    _, (again, _) = texts_of(encoder, group_of(encoder, row("Hello", "Quite so." + ending.strip(), "No.")))
    assert again == answer


@pytest.mark.parametrize(
    ("name", "terminator"),
    [
        ("channels", "<|call|>"),
        ("observation", "<|observation|>"),
        ("turn_channels", "<|tool_response>"),
        ("actions_wrapped", "<|END_OF_TURN_TOKEN|>"),
    ],
)
def test_calls_may_end_in_a_token_of_their_own(name: str, terminator: str) -> None:
    encoder = encoder_for(name)
    group = group_of(encoder, row("Weather?", (assistant("", tool_calls=[CALL]),), "No idea.", tools=TOOLS))
    index = encoder.tokenizer.convert_tokens_to_ids(terminator)
    assert group.response_ids[0][-1] == index
    assert group.response_ids[1][-1] == encoder.terminator_id
    assert index in encoder.terminator_ids  # a generation stops there as well


# The prompt for generation.


def test_the_two_prompts_are_told_once_with_the_switch_that_makes_them_agree() -> None:
    encoder = TemplateEncoder(corpus_tokenizer("no_think"), chat_template_kwargs={"enable_thinking": True})
    _, report = prepare_groups([row("Hello", "Yes", "No"), row("Hi", "Sure", "Never")], encoder)
    told = [text for text in report.warnings() if "for generation" in text]
    assert len(told) == 1
    assert "2 of 2 rows" in told[0]
    assert "'<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'" in told[0]
    assert 'chat_template_kwargs: {"enable_thinking": false}' in told[0]
    mended = TemplateEncoder(corpus_tokenizer("no_think"), chat_template_kwargs={"enable_thinking": False})
    _, report = prepare_groups([row("Hello", "Yes", "No")], mended)
    assert not [text for text in report.warnings() if "for generation" in text]


def test_reasoning_rows_train_the_generation_prompt_where_they_begin_with_it() -> None:
    encoder = encoder_for("tilde_marks")
    reasoned = group_of(
        encoder, row("Hello", (assistant("Wet.", reasoning_content="Clouds."),), (assistant("Dry.", reasoning_content="Sun."),))
    )
    prompt, answers = texts_of(encoder, reasoned)
    assert prompt.endswith("]~b]ai\n<think>\n")
    assert answers[0] == "Clouds.\n</think>\nWet.[e~["
    assert "other_generation_prompt" not in reasoned.notes
    assert "other_generation_prompt" in group_of(encoder, row("Hello", "Wet.", "Dry.")).notes


# Variables.


def test_a_rows_own_variables_reach_the_template(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "Hello", "chosen": "Yes", "rejected": "No", "chat_template_kwargs": {"enable_thinking": true}}\n'
        '{"prompt": "Hello", "chosen": "Yes", "rejected": "No", "chat_template_kwargs": "{\\"enable_thinking\\": false, \\"x\\": null}"}\n'
        '{"prompt": "Hello", "chosen": "Yes", "rejected": "No", "chat_template_kwargs": null}\n'
        '{"prompt": "Hello", "chosen": "Yes", "rejected": "No", "chat_template_kwargs": {"add_generation_prompt": true}}\n'
        '{"prompt": "Hello", "chosen": "Yes", "rejected": "No", "chat_template_kwargs": [1]}\n'
    )
    first, second, third, fourth, fifth = stream_preferences(str(path))
    assert (fourth.reason, fifth.reason) == ("wrong_type", "wrong_type")  # type: ignore[union-attr]
    encoder = encoder_for("think_switch")
    prompts = []
    for item in (first, second, third):
        assert isinstance(item, Preference)
        group = group_of(encoder, item)
        prompts.append(encoder.tokenizer.decode(group.prompt_ids))
        assert encoder.prompt_ids(item.prompt, item.tools, item.chat_template_kwargs).tolist() == group.prompt_ids.tolist()
    assert prompts[1].endswith("<think>\n\n</think>\n\n")
    assert prompts[0] == prompts[2]
    assert not prompts[0].endswith("</think>\n\n")


def test_variables_that_are_not_the_templates_are_refused() -> None:
    with pytest.raises(UserError, match="add_generation_prompt"):
        TemplateEncoder(build_tokenizer(), chat_template_kwargs={"add_generation_prompt": False})


# Templates that are chosen.


def test_a_template_that_needs_tools_is_chosen_by_name() -> None:
    needs = all_templates()["chatml_tools"].replace(
        "{% if tools %}", "{% if not tools %}{{ raise_exception('no tools given') }}{% endif %}{% if tools %}"
    )
    tokenizer = build_tokenizer("newline_merging", None)
    tokenizer.chat_template = {"default": all_templates()["chatml"], "tool_use": needs}
    encoder = TemplateEncoder(tokenizer, chat_template="tool_use")
    group = group_of(encoder, row("Weather?", (assistant("", tool_calls=[CALL]),), "No idea.", tools=TOOLS))
    assert "Trondheim" in encoder.tokenizer.decode(group.response_ids[0])
    dropped = encoder.encode(row("Weather?", "Wet.", "Dry."))
    assert isinstance(dropped, Dropped)
    assert "no tools given" in dropped.detail
    with pytest.raises(DataError, match="the first reason"):
        TemplateEncoder(
            build_tokenizer(), chat_template="{{ raise_exception('the first reason') if messages[0].content is string else 1 + '' }}"
        )


def test_the_built_in_template_begins_as_the_tokenizer_does() -> None:
    from tokenizers import processors

    plain, begun = build_tokenizer(template=None), build_tokenizer(template=None)
    special = [("<s>", begun.bos_token_id)]
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=special)
    for tokenizer, beginning in ((plain, "<|im_start|>"), (begun, "<s><|im_start|>")):
        encoder = TemplateEncoder(tokenizer, chat_template="chatml")
        prompt, _ = texts_of(encoder, group_of(encoder, row("Hello", "Yes", "No")))
        assert prompt.startswith(beginning + "user")
        assert encoder.encode(row("Hello", "Yes", "No")).prompt_ids.tolist().count(begun.bos_token_id) == (tokenizer is begun)  # type: ignore[union-attr]


def test_tokens_that_the_tokenizer_lacks_are_told() -> None:
    source = all_templates()["chatml"].replace("<|im_", "<|turn_")
    _, report = prepare_groups([row("Hello", "Yes", "No")], TemplateEncoder(build_tokenizer(), chat_template=source))
    assert any("'<|turn_start|>', '<|turn_end|>'" in text and "no token" in text for text in report.warnings())
    _, report = prepare_groups([row("Hello", "Yes", "No")], encoder_for("chatml"))
    assert not report.remarks


# What is a token of a role, and what is text.


def test_a_default_system_prompt_may_speak_of_any_token() -> None:
    encoder = encoder_for("think_in_system", special_tokens_in_text="split")
    group = group_of(encoder, row("Hello", "<think>\nBecause.\n</think>\n\nYes.", "No."))
    assert "special_tokens_in_text" not in group.notes
    assert encoder.tokenizer.convert_tokens_to_ids("<think>") in group.response_ids[0]


@pytest.mark.parametrize("policy", ["warn", "split"])
@pytest.mark.parametrize("name", ["think_in_system", "think_switch", "chatml"])
def test_reasoning_marks_that_are_special_tokens_are_no_roles(name: str, policy: str) -> None:
    tokenizer = corpus_tokenizer(name)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<think>", "</think>")])
    assert tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<think>")].special
    encoder = TemplateEncoder(tokenizer, special_tokens_in_text=policy)
    group = group_of(encoder, row("Hello", "<think>\nBecause.\n</think>\n\nYes.", "No."))
    assert "special_tokens_in_text" not in group.notes
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert set(marks) <= {*group.prompt_ids.tolist(), *group.response_ids[0].tolist()}
    opening = group_of(encoder, row("Hello", "Yes.<|im_end|>\n<|im_start|>system", "No."))
    assert "special_tokens_in_text" in opening.notes


@pytest.mark.parametrize("policy", ["warn", "split"])
@pytest.mark.parametrize("name", ["mistral", "upper_colon"])
def test_tags_that_look_like_tokens_stay_in_a_text(name: str, policy: str) -> None:
    encoder = encoder_for(name, special_tokens_in_text=policy)
    group = group_of(encoder, row("<s>old</s> or new?", "<s>old</s> is gone", "No."))
    prompt, (answer, _) = texts_of(encoder, group)
    assert "<s>old</s> or new?" in prompt.replace("<s> ", "<s>").replace(" </s>", "</s>")
    assert "<s>old</s> is gone" in answer.replace("<s> ", "<s>").replace(" </s>", "</s>")
    whole = group_of(encoder, row("Hello", "<s>A whole answer</s>", "No."))
    if policy == "warn":  # a sequence's own beginning and end are not trained twice
        assert texts_of(encoder, whole)[1][0].strip() == "A whole answer</s>"
