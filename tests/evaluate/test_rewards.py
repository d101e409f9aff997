"""Rewards of many texts at once against transformers' own pipeline, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo.evaluate.cache import Cache
from orpo.evaluate.judging import rewards
from orpo.evaluate.judging.local import RewardModel

PAIRS = [
    ("What is new?", "Nothing."),
    ("What is new?", "A lot, and more than you think."),
    ("What is new?", "A lot, and less."),
    (({"role": "user", "content": "Hi"},), "Hello"),
    ("Tell me a story about the sea, the boats and the people who live there.", "No."),
    ("Tell me a story about the sea, the boats and the people who live there.", ""),
    ("What is new?", "Nothing."),
]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1, "vocab_size": 384}


def folder_of(kind: str, tmp_path: Path, tiny_tokenizer_factory: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer_factory()
    own: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if kind in ("bert", "bert without padding"):
        tokenizer.chat_template = None
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        name, own = "Bert", {**own, "intermediate_size": 64}
    elif kind == "gpt2":
        name, own = "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, **own}
    else:
        name, own = kind, {"intermediate_size": 64, "num_key_value_heads": 2, **own}
        if kind == "Qwen3":
            own["head_dim"] = 8
    if kind.endswith("without padding"):
        own["pad_token_id"] = None
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **own})
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():  # heads of rewards as large as real ones
        getattr(model, "score", getattr(model, "classifier", None)).weight.mul_(20)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "way"),
    [("Llama", "packed"), ("Qwen3", "packed"), ("gpt2", "packed"), ("bert", "padded"), ("bert without padding", "one_by_one")],
)
def test_scores_are_those_of_the_pipeline(kind: str, way: str, tmp_path: Path, tiny_tokenizer_factory: Any) -> None:
    from transformers import pipeline

    from orpo.evaluate.judging.local import as_messages

    folder = folder_of(kind, tmp_path / "reward", tiny_tokenizer_factory)
    reward = RewardModel(str(folder), device="cpu")
    texts = [reward._inputs(as_messages(prompt), answer) for prompt, answer in PAIRS]
    with torch.no_grad():
        assert rewards.choose_way(reward.model, texts).__name__ == way
    cache = Cache(tmp_path / "cache.jsonl")
    told: list[tuple[int, int]] = []
    found = reward.scores(PAIRS, cache, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(PAIRS), len(PAIRS))
    classify = pipeline("text-classification", str(folder), device="cpu")
    for (prompt, answer), score in zip(PAIRS, found, strict=True):
        messages = as_messages(prompt)
        if reward.tokenizer.chat_template:
            asked: Any = reward.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        else:
            asked = {"text": messages[0]["content"], "text_pair": answer}
        (said,) = classify([asked], function_to_apply="none")
        assert score == pytest.approx(said["score"], rel=1e-5, abs=1e-5)
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == len(PAIRS) - 1, "the same text twice is scored once"
    assert reward.scores(PAIRS, Cache(tmp_path / "cache.jsonl")) == found


def test_what_a_batch_holds_changes_no_score(tmp_path: Path, tiny_tokenizer_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModel(str(folder_of("Llama", tmp_path, tiny_tokenizer_factory)), device="cpu")
    whole = reward.scores(PAIRS, Cache())
    monkeypatch.setattr(rewards.batches, "__defaults__", (90,))
    assert reward.scores(PAIRS, Cache()) == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_a_way_that_gives_other_scores_is_not_taken(tmp_path: Path, tiny_tokenizer_factory: Any) -> None:
    """A head that reads the last column, padding or not, and no linear layer that packing could call."""

    class Last(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.cumsum(1)[..., :1]

    reward = RewardModel(str(folder_of("Llama", tmp_path, tiny_tokenizer_factory)), device="cpu")
    reward.model.score = Last()
    reward.model.config.pad_token_id = 383  # one that padding does not mark, as far as this head knows
    real = reward.model.forward

    def forward(**inputs: Any) -> Any:
        output = real(**inputs)
        output.logits = output.logits + inputs["input_ids"].shape[1]
        return output

    whole = reward._inputs([{"role": "user", "content": "a b c d"}], "e")
    reward.model.forward = forward
    texts = [{name: tensor[:, :size] for name, tensor in whole.items()} for size in (4, 6, 9)]
    with torch.no_grad():
        assert rewards.choose_way(reward.model, texts) is rewards.one_by_one
