"""The report of a comparison between methods: who is better where the intervals part, at what cost, and what became of the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo.report.evaluations import METRICS, Record, result_sections
from orpo.report.facts import ComparisonFacts
from orpo.report.methods import cost_section, parting_section, sweep_section, trial_section
from orpo.report.runpage import environment_section, short_name
from orpo.report.sections import (
    Cell,
    Page,
    Row,
    Section,
    Statement,
    Table,
    estimate,
    human_count,
    items,
    number,
    part,
    parts,
    show,
    text,
)
from orpo.report.shown import BEFORE, colour_of, error_bar, warnings_among
from orpo.system.intervals import smallest_shown
from orpo.webpage import Figure, figure, label

_METRIC_WORDS = {key: (words, style) for key, words, style, _ in METRICS} | {"moved_accuracy": ("accuracy of the implicit reward", ".1%")}
_TONE_OF = {True: "good", False: "bad", None: "open"}


def comparison_page(facts: ComparisonFacts) -> Page:
    """The whole page of a comparison."""
    found = facts.found
    status = text(found.get("status"), "unknown")
    page = Page(facts.folder.resolve().name, "comparison", status, "good" if status == "complete" else "open", [_what_was_compared(facts)])
    page.counts = _counts(facts)
    page.notes = facts.notes
    page.sections = [
        verdict_section(facts),
        claim_section(facts),
        parting_section(facts),
        cost_section(facts),
        trial_section(facts),
        sweep_section(facts),
        *_evaluations(facts),
        data_section(facts),
        _environment(facts),
    ]
    return page


def _what_was_compared(facts: ComparisonFacts) -> str:
    names = [facts.label_of(name) for name in facts.methods]
    listed = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)
    data, model = parts(facts.found, "data"), short_name(part(facts.found, "start", "model"))
    said = f"{listed}, each from the same start ({model or 'unknown'}) on the same pairs in the same order"
    return f"{said}: {human_count(data.get('num_train'))} rows of {short_name(data.get('source')) or 'unknown data'}."


def _counts(facts: ComparisonFacts) -> list[tuple[str, str, str]]:
    data = parts(facts.found, "data")
    counts = [(str(len(facts.methods)), "methods", "")]
    seeds = {text(run.get("seed")) for method in facts.methods.values() for run in items(method, "runs") if isinstance(run, Mapping)}
    if seeds:
        counts.append((str(len(seeds)), "seeds" if len(seeds) > 1 else "seed", ""))
    for key, words in (("num_train", "rows to train on"), ("num_validation", "rows to tune on"), ("num_test", "rows to test on")):
        if number(data.get(key)) is not None:
            counts.append((human_count(data[key]), words, ""))
    return counts


# ---- who is better ---------------------------------------------------------------------------------------------------------------------


def verdict_section(facts: ComparisonFacts) -> Section:
    """The summary table with intervals, and the verdicts."""
    section = Section("summary", "Held-out pairs, method by method", short="Summary")
    rows = [("start", BEFORE, parts(facts.found, "start", "test"))]
    rows += [(name, facts.label_of(name), parts(method, "summary")) for name, method in facts.methods.items()]
    known = [row for row in rows if any(part(row[2], key) is not None for key in _METRIC_WORDS)]
    if not known:
        return section
    keys = [key for key in _METRIC_WORDS if key != "log_odds_accuracy" and any(part(one, key) is not None for *_, one in known)]
    table: list[Row] = [[Cell(words), *(estimate(one.get(key), _METRIC_WORDS[key][1]) for key in keys)] for _, words, one in known]
    section.tables.append(Table(("", *(_METRIC_WORDS[key][0] for key in keys)), table))
    section.figures = {key: _forest(known, key) for key in ("accuracy", "margin")}
    section.lead.append(
        "Intervals: 95 %, bootstrap over prompts, seeds drawn along. Each method was tuned on other rows than these. "
        "A verdict is given only where the interval of the difference leaves out zero and every seed points the same way."
    )
    _add_verdicts(section, facts)
    section.statements[:0] = [
        one
        for results in _everyones_evaluations(facts).values()
        for one in warnings_among({name: part(r, "show") for name, r in results.items()})
    ]
    return section


_HEADLINES = ("accuracy", "margin")


def _add_verdicts(section: Section, facts: ComparisonFacts) -> None:
    """Clear differences of accuracy and margin in words, ORPO's first; every difference in a table."""
    verdicts = [verdict for verdict in items(facts.found, "verdicts") if isinstance(verdict, Mapping)]
    if not verdicts:
        return
    verdicts.sort(key=lambda verdict: "orpo" not in (verdict.get("first"), verdict.get("second")))
    clear = [verdict for verdict in verdicts if verdict.get("is_clear") is True and verdict.get("metric") in _HEADLINES]
    section.statements = [Statement(text(verdict.get("text")), _tone_for_orpo(verdict)) for verdict in clear]
    if not clear:
        section.statements.append(
            Statement("No difference of accuracy or margin between two methods can be told from chance here.", "open")
        )
    rows: list[Row] = []
    for verdict in verdicts:
        words, style = _METRIC_WORDS.get(text(verdict.get("metric")), (text(verdict.get("metric")), "+.3f"))
        style = "+.1%p" if "%" in style else style
        methods = f"{facts.label_of(text(verdict.get('first')))} minus {facts.label_of(text(verdict.get('second')))}"
        is_clear = verdict.get("is_clear") is True
        rows.append(
            [
                Cell(methods),
                words,
                estimate(verdict.get("difference"), style),
                Cell("clear" if is_clear else "not clear", tone="" if is_clear else "soft"),
                Cell(show(_smallest(verdict.get("difference")), style.removeprefix("+"))),
            ]
        )
    section.tables.append(
        Table(
            ("methods", "what", "difference", "", "would have shown (80 % power)"),
            rows,
            title="Every difference between two methods",
            num_texts=2,
            is_folded=True,
        )
    )


def _smallest(difference: Any) -> float | None:
    return smallest_shown(number(part(difference, "low")), number(part(difference, "high")))


def _tone_for_orpo(verdict: Mapping[str, Any]) -> str:
    """A tick where ORPO is ahead and a cross where it is behind; a difference among others is neither. More is better in all headlines."""
    value = number(part(verdict, "difference", "value"))
    if value is None or "orpo" not in (verdict.get("first"), verdict.get("second")):
        return ""
    is_ahead = (value > 0) == (verdict.get("first") == "orpo")
    return "good" if is_ahead else "bad"


def _forest(known: Sequence[tuple[str, str, dict[str, Any]]], key: str) -> Figure | None:
    """A method's estimate per line, with its interval, and every seed as a faint dot."""
    points = [(name, words, part(one, key)) for name, words, one in known if number(part(one, key, "value")) is not None]
    traces: list[dict[str, Any]] = []
    for name, words, value in points:
        colour = "var(--soft)" if name == "start" else colour_of(name, [one for one, *_ in known])
        marker = {"color": colour, "size": 11}
        seeds = [seed for seed in map(number, items(value, "seeds")) if seed is not None]
        if len(seeds) > 1:
            dots = {"color": colour, "size": 6, "opacity": 0.45}
            traces.append(
                {"type": "scatter", "mode": "markers", "x": seeds, "y": [label(words)] * len(seeds), "marker": dots, "name": "one seed"}
            )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [number(part(value, "value"))],
                "y": [label(words)],
                "marker": marker,
                "error_x": error_bar([value], colour),
                "name": label(words),
            }
        )
    words, style = _METRIC_WORDS[key]
    axis = {"tickformat": ".0%"} if "%" in style else {"zeroline": True}
    height = 110 + 34 * len(points)
    return figure(
        words.capitalize(), traces, xaxis=axis, yaxis={"autorange": "reversed", "type": "category"}, showlegend=False, height=height
    )


def claim_section(facts: ComparisonFacts) -> Section:
    """What is claimed for ORPO, and whether it held here."""
    section = Section("claims", "What is claimed for ORPO, and whether it held here", short="Claims")
    for claim in items(facts.found, "claims"):
        if not isinstance(claim, Mapping) or not text(claim.get("claim")):
            continue
        holds = claim.get("holds")
        tone = _TONE_OF[holds if isinstance(holds, bool) else None]
        section.statements.append(Statement(text(claim["claim"]), tone, text(claim.get("evidence"))))
    if section.statements:
        section.lead.append("✓ held, ✗ did not hold, ? cannot be told, on this model and these pairs; other sizes and data may differ.")
    return section


# ---- evaluations, data, environment ----------------------------------------------------------------------------------------------------


def _evaluations(facts: ComparisonFacts) -> list[Section]:
    """Results of `orpo eval` of the start and of each method's first evaluated run, in common figures."""
    everyone: dict[str, dict[str, Record]] = {}
    for task, by_name in _everyones_evaluations(facts).items():
        for name, record in by_name.items():
            everyone.setdefault(name, {})[task] = record
    sections = result_sections({}, everyone)
    for section in sections:
        if not section.is_empty and len(facts.methods) > 1:
            section.lead.append("Of each method, its first seed that was evaluated.")
    return sections


def _everyones_evaluations(facts: ComparisonFacts) -> dict[str, dict[str, Record]]:
    """Task -> model -> record."""
    everyone = {BEFORE: _records(part(facts.found, "start", "evaluations"))}
    for name, method in facts.methods.items():
        found = (_records(part(run, "evaluations")) for run in items(method, "runs"))
        everyone[facts.label_of(name)] = next(filter(None, found), {})
    tasks = dict.fromkeys(task for records in everyone.values() for task in records)
    return {task: {name: records[task] for name, records in everyone.items() if task in records} for task in tasks}


def _records(evaluations: Any) -> dict[str, Record]:
    return {
        task: dict(record)
        for task, record in parts(evaluations).items()
        if isinstance(record, Mapping) and isinstance(record.get("result"), Mapping)
    }


def data_section(facts: ComparisonFacts) -> Section:
    """Rows, splits, what was dropped."""
    section = Section("data", "Data")
    data = parts(facts.found, "data")
    names = (
        ("source", "source"),
        ("num_train", "rows to train on"),
        ("num_validation", "rows to tune on"),
        ("num_test", "rows to test on"),
    )
    for key, words in (*names, ("fingerprint", "fingerprint")):
        if text(data.get(key)):
            section.facts.append((words, short_name(data[key]) if key == "source" else text(data[key])))
    dropped = [(code, count) for code, count in parts(data, "dropped").items() if number(count)]
    if dropped:
        section.facts.append(("dropped", ", ".join(f"{code} {human_count(count)}" for code, count in dropped)))
    return section


def _environment(facts: ComparisonFacts) -> Section:
    stored = parts(facts.found, "configuration")
    values = {key: part(item, "value") for key, item in stored.items() if isinstance(item, Mapping)}
    given = {key: value for key, value in values.items() if part(stored, key, "origin") != "default"}
    section = environment_section(facts.found, facts.folder.resolve().name, given=given, everything=values, command="")
    if text(part(facts.found, "start", "sha256")):
        section.facts.append(("starting weights, sha256", text(part(facts.found, "start", "sha256"))))
    options = parts(facts.found, "options") or parts(facts.found, "grid")
    if options:
        from orpo.report.runpage import as_yaml

        section.codes.insert(0, ("What was compared", as_yaml(options).rstrip(), False))
    return section
