"""Tiny tokenizers that split text by the rules of well-known families."""

from __future__ import annotations

import json
from typing import Any

from orpo.models.gguf_write import _LLAMA3_SPLIT, _QWEN2_SPLIT
from tinymodels import CHATML_TEMPLATE, build_tiny_tokenizer


def smollm_like() -> Any:
    """Single digits, then GPT-2's rule."""
    from tokenizers import pre_tokenizers

    tokenizer = build_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def llama3_like() -> Any:
    """Llama 3's rule, which SmolLM3 has too."""
    return _split_by(_LLAMA3_SPLIT)


def qwen2_like() -> Any:
    """Qwen's rule; characters are composed first."""
    from tokenizers import normalizers

    tokenizer = _split_by(_QWEN2_SPLIT)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _split_by(rule: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = build_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rule), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def sentencepiece_like(*, is_prefixed: bool = True) -> Any:
    """Byte-fallback BPE with "▁" for blanks, as Llama 2 and the first Mistral have; not prefixed, as Gemma has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    plain = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prefix = [normalizers.Prepend("▁")] if is_prefixed else []
    plain.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if is_prefixed else []
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False)
    plain.train_from_iterator(["Hello, the answer is yes.", "two blanks and the seven", "the answer is here"] * 3, trainer)
    settings = json.loads(plain.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # the byte tokens are pieces, not special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=CHATML_TEMPLATE.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"),
    )


def gemma_like() -> Any:
    """No blank is put before a text."""
    return sentencepiece_like(is_prefixed=False)
