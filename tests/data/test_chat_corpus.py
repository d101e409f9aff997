"""Every chat template that the tests know, over a grid of rows, against transformers' own rendering."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from chatcorpus import all_templates, corpus_tokenizer, tokens_of
from chatgrid import Cell, Oracle, Verdict, grid, judge
from orpo.data.template import TemplateEncoder

NUM_TEMPLATES = 110
"""Without TRL's there would be fewer than that: the test skips to say so."""

SAMPLE = 0.12
"""Share of the grid that is tried by default; a cell is drawn by a fixed seed."""


def verdicts(name: str, share: float) -> list[tuple[Cell, Verdict]]:
    oracle = Oracle(TemplateEncoder(corpus_tokenizer(name), max_length=100_000))
    draw = random.Random(f"rows of {name}")
    cells = [cell for cell in grid(tokens_of(all_templates()[name])) if draw.random() < share]
    return [(cell, verdict) for cell in cells if (verdict := judge(oracle, cell)) is not None]


def assert_right(found: list[tuple[Cell, Verdict]]) -> None:
    bad = [f"{cell.name}: {verdict.outcome}: {verdict.detail}" for cell, verdict in found if verdict.outcome not in ("exact", "refused")]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", sorted(all_templates()))
def test_rows_are_what_the_template_makes_of_them(name: str) -> None:
    assert_right(verdicts(name, SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(all_templates()))
def test_all_rows_are_what_the_template_makes_of_them(name: str) -> None:
    """Each ends where it ends, holds what the row holds, and nothing that can be trained is refused."""
    found = verdicts(name, 1.0)
    assert_right(found)
    outcomes = Counter(verdict.outcome for _, verdict in found)
    assert outcomes["exact"] > len(found) / 2, outcomes


def test_the_corpus_is_there() -> None:
    if len(all_templates()) < NUM_TEMPLATES:
        pytest.skip("TRL, which brings the chat templates of many models, is not installed")
    assert {"trl/gptoss", "trl/gemma4", "trl/cohere2", "response_wrapped"} <= set(all_templates())
