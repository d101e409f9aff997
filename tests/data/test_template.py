"""What `TemplateEncoder` makes of a row, held to transformers' own rendering and tokenising."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chattemplates import KINDS, LLAMA3, MISTRAL, MISTRAL_LATE_SYSTEM, QWEN3, STYLES, TERMINATORS, ZEPHYR, build_tokenizer
from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Message, Preference, Text, TokenGroup, Where
from orpo.errors import DataError, UserError

WHERE = Where("rows.jsonl", 6, 7)
DIALOGUE: tuple[Message, ...] = (
    {"role": "user", "content": "What is the weather?"},
    {"role": "assistant", "content": "Sunny, with light wind."},
    {"role": "user", "content": "And tomorrow?"},
)


def preference(prompt: Text, *responses: Text, tools: tuple[dict[str, Any], ...] | None = None) -> Preference:
    pairs = tuple((0, i) for i in range(1, len(responses)))
    return Preference(prompt=prompt, responses=responses, pairs=pairs, where=WHERE, tools=tools)


def encode(encoder: TemplateEncoder, prompt: Text, *responses: Text, **options: Any) -> TokenGroup:
    group = encoder.encode(preference(prompt, *responses, **options))
    assert isinstance(group, TokenGroup), group
    return group


def messages_of(prompt: Text, answer: Text, *, parts: bool = False) -> list[Message]:
    """The conversation as a user of transformers would write it."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns] if parts else turns


def assert_notes(encoder: TemplateEncoder, group: TokenGroup, prompt: Text, *others: str) -> None:
    """These notes alone; and, exactly where it is so, that the prompt is another than the template's own for generation."""
    conversation = messages_of(prompt, "x", parts=bool(encoder.facts and encoder.facts.wants_parts))[:-1]
    bare = encoder.tokenizer.apply_chat_template(conversation, tokenize=False)
    text = encoder.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    is_known = text != bare or not (encoder.facts and encoder.facts.generation is None)
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    is_other = is_known and ids != group.prompt_ids.tolist()
    assert set(group.notes) == {*others, *(["other_generation_prompt"] if is_other else [])}


def assert_is_templates_own(encoder: TemplateEncoder, group: TokenGroup, prompt: Text, answers: tuple[Text, ...], **options: Any) -> None:
    """Prompt + answer are the first ids of apply_chat_template, and only blanks and special tokens follow there."""
    tokenizer, facts = encoder.tokenizer, encoder.facts
    assert facts is not None
    for answer, response in zip(answers, group.response_ids, strict=True):
        conversation = messages_of(prompt, answer, parts=facts.wants_parts)
        reference = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **options)
        ids = [*group.prompt_ids.tolist(), *response.tolist()]
        compared = ids[:-1] if facts.end.is_appended else ids
        assert reference[: len(compared)] == compared
        assert tokenizer.decode(reference[len(compared) :], skip_special_tokens=True).strip() == ""
        assert ids[-1] == encoder.terminator_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_the_templates_own(style: str, kind: str) -> None:
    encoder = TemplateEncoder(build_tokenizer(kind, STYLES[style]))
    for prompt in ("Hello there?", DIALOGUE):
        answers = ("Yes, you.\n\nThe answer is no.", "7")
        group = encode(encoder, prompt, *answers)
        assert_is_templates_own(encoder, group, prompt, answers)
        np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)
        assert group.is_ended == (True, True)
        assert_notes(encoder, group, prompt)
        assert group.prompt_ids.dtype == np.int32


@pytest.mark.parametrize("style", STYLES)
def test_the_terminator_is_found_by_probing(style: str) -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", STYLES[style]))
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.terminator_id) == TERMINATORS.get(style, "<|im_end|>")
    assert encoder.terminator_ids[0] == encoder.terminator_id
    assert encoder.tokenizer.eos_token_id in encoder.terminator_ids
    group = encode(encoder, "Hello", "One two.", "Three")
    for response in group.response_ids:
        assert response.tolist().count(encoder.terminator_id) == 1


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        ("gemma", "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "<s>[INST] Hello [/INST]"),
        ("no_generation_prompt", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        ("think_in_prompt", "<s><|user|>Hello<|assistant|>"),
        ("think_merging", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>"),
        ("harmony", "<|start|>user<|message|>Hello<|end|><|start|>assistant"),
        ("alpaca", "### User:\nHello\n\n### Response:\n"),
    ],
)
def test_where_the_prompt_ends(style: str, expected: str) -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", STYLES[style]))
    group = encode(encoder, "Hello", "Yes", "No")
    assert encoder.tokenizer.decode(group.prompt_ids) == expected


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"no_generation_prompt", "think_in_prompt", "think_merging"}))
def test_the_prompt_is_the_generation_prompt_where_it_is_a_prefix(style: str) -> None:
    tokenizer = build_tokenizer("newline_merging", STYLES[style])
    encoder = TemplateEncoder(tokenizer)
    conversation = messages_of("Hello", "x", parts=bool(encoder.facts and encoder.facts.wants_parts))[:-1]
    expected = tokenizer.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode(encoder, "Hello", "Yes", "No").prompt_ids.tolist() == expected


def test_smollm2_against_transformers(chat_tokenizer: Any) -> None:
    encoder = TemplateEncoder(chat_tokenizer)
    answers = ("Sure!\n\n1. Sea\n2. Sky 😀", "No.")
    for prompt in ("Tell me a story — in two lines", DIALOGUE, ({"role": "system", "content": "Be short."}, *DIALOGUE)):
        group = encode(encoder, prompt, *answers)
        assert_is_templates_own(encoder, group, prompt, answers)
    assert chat_tokenizer.convert_ids_to_tokens(encoder.terminator_id) == "<|im_end|>"


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin or "").parent / "chat_templates" if spec else Path()
    return sorted(folder.glob("*.jinja")) if spec else []


@pytest.mark.skipif(not trl_templates(), reason="TRL, which brings the chat templates of many models, is not installed")
@pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)
def test_templates_of_real_models(path: Path) -> None:
    """Row 16 for every chat template that TRL ships (seventy-odd model families), over a tokenizer that knows their special tokens."""
    from tokenizers import AddedToken

    source = path.read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"<\|[^|>]{1,30}\|>|<｜[^｜>]{1,30}｜>|<[a-z_]{3,30}>|<[|][a-z]+>|<[a-z]+[|]>|\[/?INST\]", source)))
    tokenizer = build_tokenizer("newline_merging", source)
    is_reasoning = re.compile("think|tool|response")
    tokenizer.add_tokens([AddedToken(name, special=not is_reasoning.search(name), normalized=False) for name in names])
    encoder = TemplateEncoder(tokenizer, max_length=10_000)
    prompts: list[Text] = ["Hello there?", DIALOGUE]
    if encoder.facts is not None and encoder.facts.system == "printed":
        prompts.append(({"role": "system", "content": "Be short."}, *DIALOGUE))
    for prompt in prompts:
        answers = ("Yes, you.\n\nFine.", "no")
        group = encode(encoder, prompt, *answers)
        assert_is_templates_own(encoder, group, prompt, answers)
        np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)
        assert_notes(encoder, group, prompt)


def test_batches_give_what_single_rows_give() -> None:
    encoder = TemplateEncoder(build_tokenizer())
    rows = [preference(f"Question {i}", f"Answer {i}", "no" * (i + 1)) for i in range(7)]
    rows[3] = preference("", "a", "b")
    for one, many in zip([encoder.encode(row) for row in rows], encoder.encode_many(rows), strict=True):
        assert type(one) is type(many)
        if isinstance(one, TokenGroup) and isinstance(many, TokenGroup):
            np.testing.assert_array_equal(one.prompt_ids, many.prompt_ids)
            assert [ids.tolist() for ids in one.response_ids] == [ids.tolist() for ids in many.response_ids]


def test_the_fast_path_is_held_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with apply_chat_template on the first rows is not for show: a wrong id in the fast path stops the run."""
    encoder = TemplateEncoder(build_tokenizer())
    right = encoder._ids
    monkeypatch.setattr(encoder._cuts, "_encode", lambda texts: [[*ids[:3], 5, *ids[4:]] for ids in right(texts)])
    with pytest.raises(Exception, match="differ from those of apply_chat_template"):
        encoder.encode(preference("Hello there", "Yes", "No"))


def test_slow_tokenizers_take_the_same_way() -> None:
    encoder = TemplateEncoder(build_tokenizer())
    group = encode(encoder, DIALOGUE, "Yes, you.", "no")
    encoder._is_fast = False
    slow = encode(encoder, DIALOGUE, "Yes, you.", "no")
    assert slow.prompt_ids.tolist() == group.prompt_ids.tolist()
    assert [ids.tolist() for ids in slow.response_ids] == [ids.tolist() for ids in group.response_ids]


def test_more_than_two_responses_share_one_prompt() -> None:
    encoder = TemplateEncoder(build_tokenizer())
    row = Preference("Hello", ("one", "two", "three", "two"), ((0, 1), (1, 3), (2, 3)), WHERE, columns={"scenario": "greeting"})
    group = encoder.encode(row)
    assert isinstance(group, TokenGroup)
    # (1, 3) are the same answer: that pair goes, and is named; its answers stay, since other pairs hold them.
    assert group.pairs == ((0, 1), (2, 3))
    assert len(group.response_ids) == 4
    assert group.notes == ("identical_pair_removed",)
    assert group.columns == {"scenario": "greeting"}


def test_a_response_that_is_in_no_pair_any_more_leaves_the_group() -> None:
    row = Preference("Hello", ("one", "one", "two", "three"), ((0, 1), (2, 3)), WHERE)
    group = TemplateEncoder(build_tokenizer()).encode(row)
    assert isinstance(group, TokenGroup)
    assert group.pairs == ((0, 1),)
    assert len(group.response_ids) == 2


def test_sft_only_rows_keep_their_one_response() -> None:
    group = TemplateEncoder(build_tokenizer()).encode(Preference("Hello", ("Yes",), (), WHERE))
    assert isinstance(group, TokenGroup)
    assert (len(group.response_ids), group.pairs, group.is_ended) == (1, (), (True,))


def test_messages_and_text_may_be_mixed() -> None:
    encoder = TemplateEncoder(build_tokenizer())
    as_text = encode(encoder, "Hello", "Yes", "No")
    as_messages = encode(encoder, ({"role": "user", "content": "Hello"},), ({"role": "assistant", "content": "Yes"},), "No")
    assert as_text.prompt_ids.tolist() == as_messages.prompt_ids.tolist()
    assert [ids.tolist() for ids in as_text.response_ids] == [ids.tolist() for ids in as_messages.response_ids]


def test_tools_reach_the_template() -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", LLAMA3))
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},)
    group = encode(encoder, "Hello", "Yes", "No", tools=tools)
    assert '"name": "weather"' in encoder.tokenizer.decode(group.prompt_ids)
    assert_is_templates_own(encoder, group, "Hello", ("Yes", "No"), tools=list(tools))
    np.testing.assert_array_equal(encoder.prompt_ids("Hello", list(tools)), group.prompt_ids)


def test_an_answer_may_be_a_tool_call() -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", LLAMA3))
    function = {"name": "weather", "arguments": {"day": 1}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    group = encode(encoder, "Hello", (call,), "I do not know")
    assert '"day": 1' in encoder.tokenizer.decode(group.response_ids[0])
    assert group.response_ids[0][-1] == encoder.terminator_id


def test_an_answer_of_several_turns_is_refused() -> None:
    """A tool's result is not written by the model; trained as part of an answer it would be."""
    turns = ({"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "42."})
    dropped = TemplateEncoder(build_tokenizer()).encode(preference("Hello", turns, "no"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "bad_messages"
    assert "assistant, tool, assistant" in dropped.detail


@pytest.mark.parametrize("style", ["parts_only", "parts_or_text", "chatml"])
def test_typed_parts_are_given_or_flattened(style: str) -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", STYLES[style]))
    parts = ({"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},)
    assert encode(encoder, parts, "Yes", "No").prompt_ids.tolist() == encode(encoder, "Hello there", "Yes", "No").prompt_ids.tolist()


def test_a_part_that_is_no_text_drops_the_row() -> None:
    parts = ({"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is it?"}]},)
    dropped = TemplateEncoder(build_tokenizer("byte_level", STYLES["parts_or_text"])).encode(preference(parts, "a", "b"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "not_text"


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "qwen3", "zephyr", "alpaca"])
def test_an_assistant_prefill_belongs_to_the_prompt(style: str) -> None:
    encoder = TemplateEncoder(build_tokenizer("newline_merging", STYLES[style]))
    prompt = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The answer"})
    group = encode(encoder, prompt, " is yes.", " is no.")
    assert_is_templates_own(encoder, group, "Hello", ("The answer is yes.", "The answer is no."))
    assert encoder.tokenizer.decode(group.prompt_ids).endswith("The answer")
    np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)


def test_a_prefill_that_ends_with_a_blank_keeps_one_prompt_for_all_answers() -> None:
    """ "The answer " and "The answer is" part before the blank in most tokenizers; so does the prompt, for every answer alike."""
    encoder = TemplateEncoder(build_tokenizer())
    prompt = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The answer "})
    group = encode(encoder, prompt, "is yes.", "was no.")
    assert group.notes == ()
    assert encoder.tokenizer.decode(group.prompt_ids).endswith("The answer")
    assert encoder.tokenizer.decode(group.response_ids[0]) == " is yes.<|im_end|>"
    np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)


def test_a_system_message_that_the_template_leaves_out_is_told() -> None:
    tokenizer = build_tokenizer("byte_level", MISTRAL_LATE_SYSTEM)
    encoder = TemplateEncoder(tokenizer)
    prompt = ({"role": "system", "content": "Be very short."}, {"role": "user", "content": "Hello"})
    group = encode(encoder, prompt, "Yes", "No")
    assert_notes(encoder, group, prompt, "text_not_printed")
    assert "other_generation_prompt" in group.notes
    assert "short" not in tokenizer.decode(group.prompt_ids)  # nor is it in what transformers makes of the whole conversation
    assert_is_templates_own(encoder, group, prompt, ("Yes", "No"))
    np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)


def test_reasoning_that_the_template_takes_out_of_an_answer_is_told() -> None:
    encoder = TemplateEncoder(build_tokenizer("byte_level", STYLES["think_in_prompt"]))
    assert_notes(encoder, encode(encoder, "Hello", "because</think>Yes", "No"), "Hello", "reasoning_not_printed")
    kept = TemplateEncoder(build_tokenizer("byte_level", QWEN3))
    assert encode(kept, "Hello", "<think>\nbecause\n</think>\n\nYes", "No").notes == ()


def test_chat_template_kwargs_are_passed_on() -> None:
    tokenizer = build_tokenizer("newline_merging", QWEN3)
    group = encode(TemplateEncoder(tokenizer, chat_template_kwargs={"enable_thinking": False}), "Hello", "Yes", "No")
    assert tokenizer.decode(group.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(group.response_ids[0]) == "Yes<|im_end|>"


def test_variables_that_the_template_does_not_read_are_told() -> None:
    tokenizer = build_tokenizer("newline_merging", QWEN3)
    assert TemplateEncoder(tokenizer, chat_template_kwargs={"enable_thinking": False}).remarks() == []
    remarks = TemplateEncoder(tokenizer, chat_template_kwargs={"enable_thnking": False}).remarks()
    assert "chat_template_kwargs: 'enable_thnking' (did you mean 'enable_thinking'?) has no effect" in remarks[0]
    plain = TemplateEncoder(tokenizer, chat_template="none", chat_template_kwargs={"enable_thinking": False})
    assert "'enable_thinking' has no effect" in plain.remarks()[0]
    row = replace(preference("Hello", "Yes", "No"), chat_template_kwargs={"enable_thnking": False})
    known = replace(row, chat_template_kwargs={"enable_thinking": True})
    groups = TemplateEncoder(tokenizer).encode_many([row, known])
    assert ["variables_not_read" in group.notes for group in groups if isinstance(group, TokenGroup)] == [True, False]


def test_a_base_model_gets_chatml_and_its_tokens() -> None:
    tokenizer = build_tokenizer(template=None)
    size = len(tokenizer)
    encoder = TemplateEncoder(tokenizer, chat_template="chatml")
    assert encoder.new_tokens == ()
    assert len(tokenizer) == size

    from tinymodels import build_tiny_tokenizer

    bare = build_tiny_tokenizer(chat_template=None)
    bare._tokenizer = _without_chatml(bare)
    encoder = TemplateEncoder(bare, chat_template="chatml")
    assert encoder.new_tokens == ("<|im_start|>", "<|im_end|>")
    assert bare.convert_tokens_to_ids("<|im_end|>") == encoder.terminator_id
    group = encode(encoder, "Hello", "Yes", "No")
    assert bare.decode(group.prompt_ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert_is_templates_own(encoder, group, "Hello", ("Yes", "No"))
    again = TemplateEncoder(bare)  # the tokenizer now carries the template, and is what gets saved
    assert encode(again, "Hello", "Yes", "No").prompt_ids.tolist() == group.prompt_ids.tolist()


def _without_chatml(tokenizer: Any) -> Any:
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {"<|im_start|>": "<a>", "<|im_end|>": "<b>"}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    state["model"]["vocab"] = {names.get(token, token): index for token, index in state["model"]["vocab"].items()}
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_prompt_answer_and_eos(kind: str) -> None:
    tokenizer = build_tokenizer(kind, template=None)
    encoder = TemplateEncoder(tokenizer)
    prompt = "Question: why?\nAnswer:"
    group = encode(encoder, prompt, " Because it is.", " No")
    whole = tokenizer("Question: why?\nAnswer: Because it is.", add_special_tokens=False)["input_ids"]
    assert [*group.prompt_ids.tolist(), *group.response_ids[0].tolist()] == [*whole, tokenizer.eos_token_id]
    assert group.prompt_ids.tolist() == tokenizer(prompt)["input_ids"] == encoder.prompt_ids(prompt).tolist()
    assert encoder.describe()["template"] == "none"


def test_plain_text_has_the_tokenizers_own_beginning_once_and_not_its_end() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    encoder = TemplateEncoder(tokenizer)
    group = encode(encoder, "Hello", " there", " you")
    assert group.prompt_ids.tolist() == tokenizer("Hello")["input_ids"][:-1]
    assert [ids.tolist().count(2) for ids in group.response_ids] == [1, 1]
    with_bos = encode(encoder, "<s>Hello", " there", " you")
    assert with_bos.prompt_ids.tolist() == group.prompt_ids.tolist()


def test_plain_text_that_merges_across_the_boundary() -> None:
    tokenizer = build_tokenizer(template=None)
    group = encode(TemplateEncoder(tokenizer), "The ans", "wer is yes", "x")
    assert group.notes == ("boundary_merge",)
    for answer, ids in zip(("wer is yes", "x"), group.response_ids, strict=True):
        whole = tokenizer("The ans" + answer)["input_ids"]
        assert [*group.prompt_ids.tolist(), *ids.tolist()] == [*whole, tokenizer.eos_token_id]
    assert "The ans".startswith(tokenizer.decode(group.prompt_ids))


def test_none_means_plain_text_even_with_a_template() -> None:
    tokenizer = build_tokenizer()
    group = encode(TemplateEncoder(tokenizer, chat_template="none"), "Hello", " there", " you")
    assert tokenizer.decode(group.prompt_ids) == "Hello"


RENDERED_STYLES = ["chatml", "llama3", "gemma", "mistral", "zephyr", "phi3", "alpaca", "harmony"]


@pytest.mark.parametrize("style", RENDERED_STYLES)
def test_rendered_strings_are_not_wrapped_again(style: str) -> None:
    tokenizer = build_tokenizer("newline_merging", STYLES[style])
    encoder = TemplateEncoder(tokenizer)
    rendered = tokenizer.apply_chat_template(messages_of(DIALOGUE, "x")[:-1], tokenize=False, add_generation_prompt=True)
    wrapped = encode(encoder, DIALOGUE, "Yes, you.", "no")
    for prompt in (rendered, rendered.removeprefix("<s>"), rendered.rstrip()):
        end = tokenizer.convert_ids_to_tokens(encoder.terminator_id)
        extra = "<|channel|>final<|message|>" if style == "harmony" else ""
        group = encode(encoder, prompt, extra + "Yes, you." + end + "\n", extra + "no")
        assert "already_rendered" in group.notes
        for mine, theirs in zip(group.response_ids, wrapped.response_ids, strict=True):
            assert [*group.prompt_ids.tolist(), *mine.tolist()] == [*wrapped.prompt_ids.tolist(), *theirs.tolist()]
        bos = "<s>" if rendered.startswith("<s>") else ""
        assert tokenizer.decode(group.prompt_ids) == bos + prompt.removeprefix("<s>")  # to the character
        np.testing.assert_array_equal(encoder.prompt_ids(prompt), group.prompt_ids)


@pytest.mark.parametrize("style", ["chatml", "zephyr", "gemma"])
def test_rendered_answers_may_bring_their_header(style: str) -> None:
    """The layout of the alignment handbook: the prompt without, the answers with the assistant's header."""
    tokenizer = build_tokenizer("byte_level", STYLES[style])
    encoder = TemplateEncoder(tokenizer)
    turns = [messages_of("Hello", answer) for answer in ("Yes", "no")]
    prompt = tokenizer.apply_chat_template(turns[0][:1], tokenize=False)
    answers = [tokenizer.apply_chat_template(turn, tokenize=False).removeprefix(prompt) for turn in turns]
    group, wrapped = encode(encoder, prompt, *answers), encode(encoder, "Hello", "Yes", "no")
    assert group.prompt_ids.tolist() == wrapped.prompt_ids.tolist()
    assert [ids.tolist() for ids in group.response_ids] == [ids.tolist() for ids in wrapped.response_ids]
    dropped = encoder.encode(preference(prompt, "Yes", "no"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "boundary"


def test_text_that_only_mentions_a_special_token_is_wrapped() -> None:
    encoder = TemplateEncoder(build_tokenizer())
    group = encode(encoder, "What does <|im_start|> mean?", "Much", "Little")
    assert group.notes == ("special_tokens_in_text",)
    assert encoder.tokenizer.decode(group.prompt_ids).startswith("<|im_start|>user\nWhat does <|im_start|> mean?<|im_end|>")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_length": 1}, "max_length"),
        ({"max_length": 8, "max_prompt_length": 8}, "max_prompt_length"),
        ({"truncation": "middle"}, "keep_end"),
        ({"special_tokens_in_text": "drop"}, "split"),
        ({"chat_template": "no/such/file.jinja"}, "no such file"),
        ({"chat_template": "chatlm"}, "chatml"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        TemplateEncoder(build_tokenizer(), **options)


def test_a_template_from_a_file_or_by_name(tmp_path: Any) -> None:
    path = tmp_path / "zephyr.jinja"
    path.write_text(ZEPHYR, encoding="utf-8")
    from_file = TemplateEncoder(build_tokenizer(template=None), chat_template=str(path))
    assert from_file.tokenizer.chat_template == ZEPHYR
    assert "zephyr.jinja" in from_file.describe()["template"]

    named = build_tokenizer(template=None)
    named.chat_template = {"default": MISTRAL, "tool_use": LLAMA3}
    assert TemplateEncoder(named).describe()["after_answer"] == "</s>"
    tools = ({"type": "function", "function": {"name": "weather"}},)
    dropped = TemplateEncoder(named).encode(preference("Hello", "Yes", "No", tools=tools))  # transformers takes "tool_use" for this row
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "boundary"
    assert encode(TemplateEncoder(named, chat_template="tool_use"), "Hello", "Yes", "No", tools=tools).is_ended == (True, True)

    path.write_text("no expressions at all", encoding="utf-8")
    with pytest.raises(DataError, match="no Jinja"):
        TemplateEncoder(build_tokenizer(), chat_template=path)


def test_a_processor_is_taken_for_the_tokenizer_it_holds() -> None:
    class Processor:
        def __init__(self) -> None:
            self.tokenizer = build_tokenizer(template=None)
            self.chat_template = ZEPHYR

    assert TemplateEncoder(Processor()).describe()["terminator"] == "</s>"


def test_describe_is_plain_json() -> None:
    import json

    facts = TemplateEncoder(build_tokenizer("byte_level", LLAMA3)).describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["terminator"] == "<|eot_id|>"
    assert facts["date"] is None
