"""Texts that begin alike are tokenised once where they do, and have the ids that each has alone."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from chattemplates import KINDS, STYLES, build_tokenizer
from orpo.data.chat.cuts import Cuts
from orpo.data.chat.render import ChatRenderer, TemplateFailed
from orpo.data.template import TemplateEncoder
from orpo.data.types import Preference, TokenGroup, Where


def made_tokenizer(*added: dict[str, Any], is_metaspace: bool = False) -> Any:
    """A word-level tokenizer over a few characters; `added` are arguments of its added tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate(["<unk>", *"abcx<>|_y▁", "ab", "ba", "▁a", "▁x", "\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "a"), ("▁", "a"), ("▁", "x")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first") if is_metaspace else pre_tokenizers.Split(" ", "merged_with_next")
    )
    tokenizer.add_tokens([AddedToken(**{"normalized": False, **token}) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def cuts_of(tokenizer: Any, *candidates: str) -> tuple[Cuts, Any]:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]

    return Cuts(tokenizer, candidates, encode), encode


@pytest.mark.parametrize("is_metaspace", [False, True])
@pytest.mark.parametrize(
    "tokens",
    [
        [{"content": "<|a|>"}],
        [{"content": "<|a|>", "lstrip": True}, {"content": "<|b|>", "rstrip": True}],
        [{"content": "<|a|>"}, {"content": "<|a|>b"}],
        [{"content": "<|a|>"}, {"content": "x<|a"}],
        [{"content": "aa"}, {"content": "<|a|>"}],
        [{"content": "<|a|>", "single_word": True}, {"content": "<|b|>"}],
        [{"content": "<|a|>", "normalized": True}, {"content": "<|b|>"}],
    ],
)
def test_ids_are_those_of_each_text_alone(tokens: list[dict[str, Any]], is_metaspace: bool) -> None:
    """Tokens that strip, overlap, hold one another or count between words alone: any text, cut anywhere."""
    tokenizer = made_tokenizer(*tokens, is_metaspace=is_metaspace)
    cuts, encode = cuts_of(tokenizer, *(str(token["content"]) for token in tokens))
    source = random.Random(0)
    pieces = [*(token["content"] for token in tokens), "a", "b", " ", "x", "<|", "|>", "\n", "?"]
    rows = []
    for _ in range(300):
        prompt = "".join(source.choices(pieces, k=source.randint(1, 8)))
        rows.append([prompt, *(prompt + "".join(source.choices(pieces, k=source.randint(0, 5))) for _ in range(2))])
    rows.append(["a<|a|>b", "b<|a|>b", "a<|a|>bb"])  # which does not begin with the prompt
    assert cuts.encode(rows) == [encode(texts) for texts in rows]


def test_only_what_is_proved_cuts() -> None:
    tokenizer = made_tokenizer(
        {"content": "<|a|>"}, {"content": "<|b|>"}, {"content": "<|b|>x"}, {"content": "aa"}, {"content": "<|c|>", "single_word": True}
    )
    cuts, _ = cuts_of(tokenizer, "<|a|>", "<|b|>", "aa", "<|c|>", "x", "<unk>", "")
    assert [cuts.last(f"ab{text}", [f"ab{text}b"]) for text in ("<|a|>", "<|b|>", "aa", "<|c|>", "x")] == [2, 0, 0, 0, 0]
    assert not cuts_of(tokenizer, "nothing")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_prompt_tokenised_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TemplateEncoder(build_tokenizer(kind, STYLES["chatml"]))
    seen: list[str] = []
    encode = encoder._ids
    monkeypatch.setattr(encoder._cuts, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    group = encoder.encode(Preference("What is the colour of the sky?", ("Blue.", "Green."), ((0, 1),), Where("rows", 0)))
    assert isinstance(group, TokenGroup)
    assert sum("colour" in text for text in seen) == 1


@pytest.mark.parametrize("style", STYLES)
def test_templates_print_what_transformers_prints(style: str) -> None:
    tokenizer = build_tokenizer("byte_level", STYLES[style])
    render = ChatRenderer(tokenizer, None, name="template", variables={"enable_thinking": True})
    asked = {"role": "user", "content": "Why?"}
    for answer in (
        {"role": "assistant", "content": "Because."},
        {"role": "assistant", "content": "Because.", "reasoning": "Hm."},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."},
    ):
        for messages, is_asked in (([asked, answer], False), ([asked, answer, asked], True)):
            options = {"add_generation_prompt": is_asked, "enable_thinking": True}
            try:
                expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception as error:
                with pytest.raises(TemplateFailed, match=re.escape(str(error)[:40])):
                    render(messages, generation_prompt=is_asked)
            else:
                assert render(messages, generation_prompt=is_asked) == expected
