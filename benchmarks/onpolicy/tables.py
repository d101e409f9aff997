"""The tables of README.md, from the results: tables.py prints the page as it should be, tables.py --write puts it there."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from orpo.evaluate.bootstrap import estimate_mean

HERE = Path(__file__).resolve().parent
PAGE, CELLS, SPEED = HERE / "README.md", HERE / "results" / "cells.json", HERE / "results" / "speed.json"
NAMES = {
    "start": "start",
    "round-1": "after round 1",
    "round-2": "after round 2",
    "round-3": "after round 3",
    "one-round": "ORPO, one round of as many pairs",
    "sft": "SFT on the start's right answers",
}
PLANNED = [(task, seed) for task, seeds in (("list", (1, 2, 3)), ("sum", (1,))) for seed in seeds]
TITLES = {"list": "Three numbered lines", "sum": "Small arithmetic in words"}


def cell_table(cells: dict[str, Any], task: str, seed: int) -> str:
    """One task and seed: pass rate, and the change against the start over the same prompts."""
    start = cells[f"{task}:{seed}:start"]
    lines = ["| | trained on | right | change | different answers | characters |", "|---|---|---|---|---|---|"]
    for name, words in NAMES.items():
        cell = cells.get(f"{task}:{seed}:{name}")
        if cell is None:
            continue
        rows = f"{cell['num_pairs']} pairs" if "num_pairs" in cell else f"{cell['num_rows']} answers" if "num_rows" in cell else ""
        change = "" if name == "start" else _change(start["by_prompt"], cell["by_prompt"])
        lines.append(
            f"| {words} | {rows} | {_percent(cell['value'])} ({_percent(cell['low'])} to {_percent(cell['high'])}) | {change} |"
            f" {_percent(cell['distinct'])} | {cell['chars']:.0f} |"
        )
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _change(before: list[float], after: list[float]) -> str:
    estimate = estimate_mean([new - old for old, new in zip(before, after, strict=True)])
    return f"{100 * estimate.value:+.1f} points ({100 * (estimate.low or 0):+.1f} to {100 * (estimate.high or 0):+.1f})"


def against_table(cells: dict[str, Any]) -> str:
    """Three rounds against the other ways: of each prompt the mean over the seeds, differences over the same prompts."""
    lines = ["| | three rounds | one round of as many pairs | SFT | rounds − one round | rounds − SFT |", "|---|---|---|---|---|---|"]
    for task, title in TITLES.items():
        seeds = [seed for of, seed in PLANNED if of == task and all(f"{task}:{seed}:{name}" in cells for name in NAMES)]
        if seeds:
            rounds, one, sft = (_by_prompt(cells, task, seeds, name) for name in ("round-3", "one-round", "sft"))
            values = [_percent(statistics.mean(rates)) for rates in (rounds, one, sft)]
            place = f"{title}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            lines.append(f"| {' | '.join([place, *values, _change(one, rounds), _change(sft, rounds)])} |")
    return "\n".join(lines)


def _by_prompt(cells: dict[str, Any], task: str, seeds: list[int], name: str) -> list[float]:
    rates = [cells[f"{task}:{seed}:{name}"]["by_prompt"] for seed in seeds]
    return [statistics.mean(of_prompt) for of_prompt in zip(*rates, strict=True)]


def missing(cells: dict[str, Any]) -> str:
    """The cells that nobody has measured yet."""
    left = {
        f"{task}, seed {seed}": [words for name, words in NAMES.items() if f"{task}:{seed}:{name}" not in cells] for task, seed in PLANNED
    }
    told = [f"- {place}: {'all' if len(names) == len(NAMES) else '; '.join(names)}" for place, names in left.items() if names]
    return "\n".join(["Not measured yet:", "", *told]) if told else "All cells are measured."


def results() -> str:
    """Everything that was measured."""
    cells = json.loads(CELLS.read_text(encoding="utf-8"))["cells"]
    parts = []
    for task, seed in PLANNED:
        if f"{task}:{seed}:start" in cells:
            parts += [f"### {TITLES[task]}, seed {seed}", cell_table(cells, task, seed)]
    return "\n\n".join([*parts, "### Three rounds against the others", against_table(cells), missing(cells)])


def speed() -> str:
    """Tokens a second, medians of the repeats."""
    if not SPEED.exists():
        return "Not measured yet."
    facts = json.loads(SPEED.read_text(encoding="utf-8"))
    lines = ["| prompts | | tokens per second of wall clock | per second of the processor | ours is so many times as fast (processor) |"]
    lines.append("|---|---|---|---|---|")
    for length, ways in facts["runs"].items():
        rates = {name: [_median(runs, clock) for clock in ("wall_s", "cpu_s")] for name, runs in ways.items()}
        for name, (wall, cpu) in rates.items():
            times = "" if name == "ours" else f"{rates['ours'][1] / cpu:.1f}"
            lines.append(f"| {length} | {name} | {wall:.0f} | {cpu:.0f} | {times} |")
    return "\n".join(lines)


def _median(runs: list[dict[str, float]], clock: str) -> float:
    return statistics.median(run["tokens"] / run[clock] for run in runs)


def written(page: str) -> str:
    """The page with its tables as the results have them."""
    for name, text in (("results", results()), ("speed", speed())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        page = re.sub(pattern, lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    page = written(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)
