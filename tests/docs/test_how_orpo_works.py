"""docs/how-orpo-works.md: its code prints what it shows, its formula is the objective's gradient, its figures are measured ones."""

from __future__ import annotations

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo.objective import ORPO, ResponseIndex, evaluate

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "how-orpo-works.md"
FIGURE = DOCS / "figures" / "alignment-stages.svg"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(page: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The page's names after all of its blocks have run, and (printed, shown) of each."""
    scope: dict[str, Any] = {}
    outputs = []
    for code, shown in BLOCK.findall(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, PAGE.name, "exec"), scope)  # noqa: S102 - the page's own examples
        outputs.append((printed.getvalue(), shown))
    return scope, outputs


def test_every_block_prints_what_the_page_shows(ran: tuple[dict[str, Any], list[tuple[str, str]]]) -> None:
    printed, shown = zip(*ran[1], strict=True)
    assert len(printed) >= 8
    assert printed == shown


def random_pairs(num_pairs: int, seed: int) -> tuple[torch.Tensor, ResponseIndex]:
    """Float64 log-probabilities of several pairs with prompts, each answer of its own length and likelihood."""
    random = torch.Generator().manual_seed(seed)
    response, weight, tokens = [], [], []
    for pair in range(num_pairs):
        prompt, chosen, rejected = torch.randint(1, 9, (3,), generator=random).tolist()
        response += [-1] * prompt + [2 * pair] * chosen + [2 * pair + 1] * rejected
        weight += [1.0] * (prompt + chosen) + [0.0] * rejected
        tokens += [float(chosen), float(rejected)]
    response_N = torch.tensor(response)
    likelihood_R = 10 ** torch.empty(2 * num_pairs, dtype=torch.float64).uniform_(-3, 1, generator=random)
    logp_N = -torch.rand(len(response), dtype=torch.float64, generator=random) * likelihood_R[response_N.clamp(min=0)]
    index = ResponseIndex(
        response_N=response_N,
        nll_weight_N=torch.tensor(weight),
        num_tokens_R=torch.tensor(tokens),
        chosen_B=torch.arange(0, 2 * num_pairs, 2),
        rejected_B=torch.arange(1, 2 * num_pairs, 2),
        num_nll_tokens=sum(weight),
        num_pairs=num_pairs,
    )
    return logp_N, index


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("orpo_alpha", "orpo_beta"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.1), (0.7, 2.5), (0.0, 1.0)])
def test_the_formula_is_the_gradient_of_the_objective(
    ran: tuple[dict[str, Any], list[tuple[str, str]]], orpo_alpha: float, orpo_beta: float, seed: int
) -> None:
    """Against autograd through the objective, and against central differences of its loss."""
    logp_N, index = random_pairs(4, seed)
    formula_N = ran[0]["orpo_gradient"](logp_N, index, orpo_alpha, orpo_beta)
    objective = ORPO(orpo_alpha, orpo_beta)
    torch.testing.assert_close(formula_N, evaluate(objective, logp_N, index).grad_N, rtol=1e-9, atol=1e-12)

    width = 1e-5 * logp_N.abs()
    for token in range(0, len(logp_N), 3):
        shift_N = torch.zeros_like(logp_N)
        shift_N[token] = width[token]
        difference = evaluate(objective, logp_N + shift_N, index).loss - evaluate(objective, logp_N - shift_N, index).loss
        assert (difference / (2 * width[token])).item() == pytest.approx(formula_N[token].item(), rel=1e-4, abs=1e-6)


def test_the_demos_figures_are_those_that_were_measured(page: str) -> None:
    """Word for word the rows of the page that says how they were measured, but for the training's time."""
    measured = (DOCS / "performance.md").read_text(encoding="utf-8").split("## The demo\n", 1)[1]
    rows = re.findall(r"^\| (before|\d+) \| (.+?) \|(?: \d+ min \d+ s)? \|$", measured, re.MULTILINE)
    assert len(rows) == 4
    for name, figures in rows:
        label = name if name == "before" else f"seed {name}"
        assert f"| {label} | {figures.removesuffix(' |')} |\n" in page


def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        assert (DOCS / path).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (DOCS / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_figure_is_whole_and_fetches_nothing() -> None:
    text = FIGURE.read_text(encoding="utf-8")
    root = ET.fromstring(text)  # noqa: S314 - our own file
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names[1:3] == ["title", "desc"], "read out where it cannot be seen"
    assert not {"script", "image", "foreignObject", "use", "a"} & set(names)
    assert not re.search(r"href|@import|url\((?!#)", text)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        if element.tag.endswith("rect"):
            x, y, wide, high = (float(element.attrib.get(name, 0)) for name in ("x", "y", "width", "height"))
            assert x + wide <= width
            assert y + high <= height
