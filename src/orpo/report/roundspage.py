"""The report of `orpo train --rounds`: what every round was worth, and why the rounds ended. What is missing or damaged is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.report.facts import ROUNDS_FILE, read_whole
from orpo.report.runpage import environment_section, short_name
from orpo.report.sections import (
    Cell,
    Page,
    Row,
    Section,
    Statement,
    Table,
    bars,
    estimate,
    human_count,
    items,
    number,
    part,
    parts,
    show,
    text,
)
from orpo.report.shown import error_bar
from orpo.webpage import Figure, figure, label

_ANSWER_FACTS = (("distinct", ".0%"), ("chars", ".0f"), ("cut", ".0%"))


def rounds_page(folder: Path) -> Page:
    """The whole page.

    Raises:
        UserError: rounds.json is damaged; there is nothing else to go by.
    """
    notes: list[str] = []
    found = read_whole(folder / ROUNDS_FILE, notes, "rounds", list, writer="orpo train --rounds")
    status = text(found.get("status"), "unknown")
    page = Page(folder.resolve().name, "rounds", status, "good" if status == "complete" else "open", [_what_was_done(found)])
    if status != "complete":
        notes.append(f"The rounds are not complete ({status}). The same command goes on from there.")
    rounds = [one for one in items(found, "rounds") if isinstance(one, Mapping)]
    page.counts = _counts(found, rounds)
    page.notes = notes
    page.sections = [_score_section(found, rounds), _pairs_section(rounds), _environment(found, folder)]
    return page


def _what_was_done(found: Mapping[str, Any]) -> str:
    model = short_name(found.get("model")) or "an unknown model"
    said = f"{model}, trained round after round on pairs of its own answers to {human_count(found.get('num_prompts'))} prompts"
    ended = text(found.get("stopped_because"))
    return said + (f"; the rounds ended by themselves: {ended}." if ended else ".")


def _counts(found: Mapping[str, Any], rounds: list[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    counts = [(str(len(rounds)), "round" if len(rounds) == 1 else "rounds", "")]
    scores = [value for one in rounds if (value := number(part(one, "held_out", "value"))) is not None]
    start = number(part(found, "start", "value"))
    if scores and start is not None:
        tone = "good" if max(scores) > start else "bad"
        counts.append((f"{show(start)} → {show(max(scores))}", "held-out score, start and best round", tone))
    pairs = sum(number(one.get("num_pairs")) or 0 for one in rounds)
    return [*counts, (human_count(pairs), "pairs", "")]


def _score_section(found: Mapping[str, Any], rounds: list[Mapping[str, Any]]) -> Section:
    """Held-out scores with intervals, how different and how long answers are."""
    section = Section("rounds", "Held-out answers, round by round", short="Rounds")
    models = [("start", parts(found, "start"))]
    models += [(f"round {text(one.get('number'))}", parts(one, "held_out")) for one in rounds]
    known = [(name, score) for name, score in models if number(score.get("value")) is not None]
    if not known:
        return section
    section.lead.append(
        f"Answers to {human_count(known[0][1].get('num_prompts'))} prompts that no round was trained on, drawn and scored as the pairs'."
        " Intervals: 95 %, bootstrap over prompts."
    )
    rows: list[Row] = [
        [
            Cell(name),
            estimate(score),
            bar,
            show(score.get("distinct"), ".0%"),
            show(score.get("chars"), ".0f"),
            show(score.get("cut"), ".0%"),
        ]
        for (name, score), bar in zip(known, bars([score for _, score in known], with_zero=False), strict=True)
    ]
    section.tables.append(Table(("", "score", "", "different answers", "characters", "cut"), rows))
    if len(known) > 1:
        section.figures["score"] = _score_figure(known)
    if ended := text(found.get("stopped_because")):
        section.statements.append(Statement(f"The rounds ended: {ended}.", "open"))
    return section


def _score_figure(known: list[tuple[str, dict[str, Any]]]) -> Figure | None:
    scores = [score for _, score in known]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [label(name) for name, _ in known],
        "y": [number(score.get("value")) for score in scores],
        "error_y": error_bar(scores, "var(--soft)"),
        "showlegend": False,
    }
    return figure("Held-out score", [trace], y="score")


def _pairs_section(rounds: list[Mapping[str, Any]]) -> Section:
    """What each round was trained on, and what was left out of it."""
    section = Section("pairs", "Pairs of each round", short="Pairs")
    if not rounds:
        return section
    columns = ("", "pairs", "rows with older pairs", "mean score before", "different answers", "chosen longer", "score and length")
    rows: list[Row] = []
    for one in rounds:
        lengths = parts(one, "lengths")
        rows.append(
            [
                Cell(f"round {text(one.get('number'))}"),
                human_count(one.get("num_pairs")),
                human_count(one.get("num_rows")),
                show(one.get("mean_score")),
                show(lengths.get("distinct"), ".0%"),
                show(lengths.get("longer"), ".0%"),
                show(lengths.get("correlation"), "+.2f"),
            ]
        )
    section.tables.append(Table(columns, rows, note="Score and length: their correlation within a prompt's answers."))
    reasons = sorted({reason for one in rounds for reason in parts(one, "left_out")})
    if reasons:
        table: list[Row] = [
            [Cell(reason.replace("_", " ")), *(human_count(part(one, "left_out", reason) or 0) for one in rounds)] for reason in reasons
        ]
        section.tables.append(Table(("left out", *(f"round {text(one.get('number'))}" for one in rounds)), table, is_folded=True))
    return section


def _environment(found: Mapping[str, Any], folder: Path) -> Section:
    return environment_section({}, folder.name, given={}, everything=parts(found, "configuration"), command="")
