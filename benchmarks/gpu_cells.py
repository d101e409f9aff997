"""What `gpu.py` measures on: random-weight models from their configurations, and random rows of given lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_arms import Cell

WORDS = 400
SIX = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
DISTINCT_STEPS = 4
"""Steps whose rows are made; later ones go over them again. TRL's trainer goes over all texts whenever it is built."""


@dataclass(frozen=True)
class Shape:
    """A model from its configuration alone."""

    kind: str
    options: dict[str, Any]
    is_lora: bool = False


def _shape(kind: str, width: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool, *, lora: bool = False) -> Shape:
    options = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 8192,
    }  # fmt: skip
    return Shape(kind, options, lora)


MODELS = {
    "Qwen2.5-3B": _shape("qwen2", 2048, 11008, 36, 16, 2, 151_936, True),
    "Llama-3.1-8B, LoRA": _shape("llama", 4096, 14336, 32, 32, 8, 128_256, False, lora=True),
    "Llama-3.2-1B": _shape("llama", 2048, 8192, 16, 32, 8, 128_256, True),
}
TINY = {name: _shape(shape.kind, 64, 128, 2, 4, 2, 512, True, lora=shape.is_lora) for name, shape in MODELS.items()}
MIXES = {"HH": (148, 40, 51), "long prompt": (2048, 256, 256), "UltraFeedback": (190, 270, 270), "four answers": (190, 120, 140, 160, 180)}
ROWS_PER_STEP = {"HH": 64, "long prompt": 8, "UltraFeedback": 32, "four answers": 16}


def tokenizer_of_words() -> Any:
    """One token a word, so that texts and ids have the same lengths."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def rows_of(mix: tuple[int, ...], count: int) -> tuple[list[Any], list[dict[str, str]]]:
    """Token groups of about these lengths (a quarter more or less), and the same as texts, a row for each pair."""
    from orpo.data.types import TokenGroup, Where

    source = np.random.default_rng(0)
    groups, rows = [], []
    for number in range(count):
        lengths = [max(2, round(source.normal(mean, mean / 4))) for mean in mix]
        prompt, *answers = (source.integers(4, 4 + WORDS, length).astype(np.int32) for length in lengths)
        pairs = ((0, 1),) if len(answers) == 2 else SIX
        groups.append(TokenGroup(prompt, tuple(answers), pairs, (True,) * len(answers), Where("random", number)))
        texts = [" ".join(f"w{token - 4}" for token in ids) for ids in answers]
        for chosen, rejected in pairs:
            rows.append({"prompt": " ".join(f"w{token - 4}" for token in prompt), "chosen": texts[chosen], "rejected": texts[rejected]})
    return groups, rows


def load_model(shape: Shape, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Random weights on the device, float32 to be trained whole, bfloat16 under an adapter; and their optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.kind, **shape.options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    dtype = torch.bfloat16 if shape.is_lora else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if shape.is_lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)


def make_cell(model: Any, optimizer: torch.optim.Optimizer, shape: Shape, mix: tuple[int, ...], rows_per_step: int) -> Cell:
    """Rows of a mix for a model that is there."""
    groups, rows = rows_of(mix, rows_per_step * DISTINCT_STEPS)
    is_half = next(model.parameters()).device.type == "cuda" or shape.is_lora
    dtype = torch.bfloat16 if is_half else torch.float32
    return Cell(model, tokenizer_of_words(), optimizer, groups, rows, len(groups[0].pairs), dtype, shape.is_lora)


def flops_of(cell: Cell, groups: list[Any]) -> float:
    """Useful operations of a step on the packed rows: every token once, attention only where a row may look."""
    config = cell.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    trained = sum(parameter.numel() for parameter in cell.model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in cell.model.parameters())
    embeddings = 0 if config.tie_word_embeddings else cell.model.get_input_embeddings().weight.numel()
    per_token = 4 * (weights - embeddings) + 2 * min(trained, weights - embeddings)
    tokens = sum(group.num_tokens for group in groups)
    seen = 0.0
    for group in groups:
        prompt = len(group.prompt_ids)
        seen += prompt**2 / 2 + sum(len(ids) * prompt + len(ids) ** 2 / 2 for ids in group.response_ids)
    return per_token * tokens + 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_size * seen
