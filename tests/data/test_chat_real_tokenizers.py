"""Chat templates with the tokenizers of five model families, as they are published: merges and special tokens that small ones lack."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from chatcorpus import all_templates, tokens_of
from chatgrid import Oracle, grid, judge
from orpo.data.template import TemplateEncoder
from orpo.models.load import load_tokenizer
from realtokenizers import FOLDER

SAMPLE = 0.3
"""Share of the grid that is tried by default."""

TEMPLATES = {
    "llama3_1": (None, "trl/llama3", "trl/llama3_1", "trl/llama3_2"),
    "qwen3": (None, "trl/qwen3", "trl/qwen2_5", "trl/qwen3_5_think", "trl/qwen3_5_nothink", "chatml_blank_before", "think_switch"),
    "gemma3": (None, "trl/gemma3", "folded_system", "gemma"),
    "gptoss": ("trl/gptoss", "channels"),
    "deepseek_v3": (None, "trl/deepseekv3", "trl/deepseek_r1_distill"),
}
"""The templates that are tried with each tokenizer; None is its own."""


@cache
def real_tokenizer(name: str) -> Any:
    if not (FOLDER / name / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {name} is not here: make tokenizers")
    return load_tokenizer(FOLDER / name)


@pytest.mark.parametrize(("name", "template"), [(name, template) for name, templates in TEMPLATES.items() for template in templates])
def test_rows_are_what_the_template_makes_of_them(name: str, template: str | None) -> None:
    tokenizer = real_tokenizer(name)
    if template is not None and template not in all_templates():
        pytest.skip("TRL, which brings this template, is not installed")
    own = tokenizer.chat_template
    try:
        encoder = TemplateEncoder(tokenizer, chat_template=template and all_templates()[template], max_length=100_000)
        draw, oracle = random.Random(f"rows of {name}"), Oracle(encoder)
        cells = [cell for cell in grid(tokens_of(str(tokenizer.chat_template))) if draw.random() < SAMPLE]
        found = [(cell.name, judge(oracle, cell)) for cell in cells]
    finally:
        tokenizer.chat_template = own
    bad = [f"{cell}: {verdict}" for cell, verdict in found if verdict is not None and verdict.outcome not in ("exact", "refused")]
    assert not bad, "\n".join(bad)
