"""What `orpo eval` found, as sections: held-out pairs, which a run's report is about, and whatever else it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo.report.sections import (
    Cell,
    Row,
    Section,
    Statement,
    Table,
    bars,
    estimate,
    excludes_zero,
    items,
    number,
    part,
    parts,
    power,
    text,
)
from orpo.report.shown import answers_of, error_bar, shown_section, statements_of
from orpo.webpage import Figure, figure

Record = dict[str, Any]
METRICS = (
    ("accuracy", "accuracy: chosen preferred", ".1%", 1),
    ("log_odds_accuracy", "accuracy by log-odds", ".1%", 1),
    ("margin", "margin, nats per token", "+.3f", 1),
    ("log_odds_ratio", "log odds ratio", "+.3f", 1),
    ("chosen_logp", "log-probability of chosen", "+.3f", 1),
    ("rejected_logp", "log-probability of rejected", "+.3f", 0),
)
"""Of pairs: key, words, format, and whether more is better (0: neither)."""
NUM_OPEN_ANSWERS = 6
_MOST_ANSWERS = 48


def result_sections(results: Mapping[str, Record], beside: Mapping[str, Mapping[str, Record]] | None = None) -> list[Section]:
    """A section for each result that is there.

    Args:
        results: task -> record.
        beside: other models' results by name, shown in the same figures.
    """
    others = beside or {}
    tasks = dict.fromkeys([*results, *(task for found in others.values() for task in found)])
    sections = []
    for task in tasks:
        named = {_name(results[task]): part(results[task], "show")} if task in results else {}
        named |= {name: part(found[task], "show") for name, found in others.items() if task in found}
        section = shown_section(task, named, own=task in results)
        if task in results and not section.is_empty:
            section.lead.append(_circumstances(results[task]))
        sections.append(section)
    return sections


def warnings_of(results: Mapping[str, Record]) -> list[Statement]:
    """What has to be known before any other verdict is read."""
    return [one for record in results.values() for one in statements_of(part(record, "show")) if one.tone == "warn"]


def _name(record: Record) -> str:
    """What a result is a result of: given answers by their author's name, a run by its folder's."""
    generator = text(part(record, "result", "generator"))
    name = generator or text(record.get("answers")) or text(record.get("target")) or "model"
    return name.rstrip("/").rpartition("/")[2] or name


def _circumstances(record: Record) -> str:
    """Seed, limit, judge and time of a result."""
    told = [f"seed {text(record.get('seed'), '?')}"]
    if number(record.get("limit")) is not None:
        told.append(f"the first {text(record['limit'])}")
    judge = record.get("judge")
    if isinstance(judge, Mapping):
        judge = (
            text(judge.get("model"))
            or text(judge.get("name"))
            or ", ".join(f"{key} {text(value)}" for key, value in judge.items() if text(value))
        )
    if text(judge):
        told.append(f"judged by {text(judge)}")
    wall = number(record.get("wall_s"))
    return "; ".join(told) + (f"; {wall:.0f} s" if wall is not None else "") + "."


def pairs_of(results: Mapping[str, Record], demo: Record) -> tuple[Record, Record, Record, str]:
    """(before, after, change, where from) of held-out pairs: from `orpo eval`, else from the demo; empty where there are none."""
    found = parts(results.get("pairs"), "result")
    if part(found, "model", "accuracy") is not None:
        return parts(found, "against"), parts(found, "model"), parts(found, "change"), text(found.get("data"), "held-out pairs")
    return parts(demo, "before"), parts(demo, "after"), parts(demo, "change"), "the demo's held-out pairs"


def pair_section(results: Mapping[str, Record], demo: Record) -> Section:
    """Before, after and change, with a sentence on what the intervals allow to say."""
    section = Section("result", "What training changed", short="Result")
    before, after, change, source = pairs_of(results, demo)
    section.statements += warnings_of(results)
    if not after:
        return section
    count = text(after.get("num_pairs"), "?")
    section.lead.append(f"{count} pairs that were not trained on: {source}. Intervals: 95 %, over prompts.")
    if change:
        section.statements.append(verdict(change))
    section.figures["parting"] = parting(before, after)
    section.tables.append(_pair_table(before, after, change))
    return section


def verdict(change: Record) -> Statement:
    """One sentence on what the change of the margin, and of the rejected answers, allows to say."""
    margin = change.get("margin")
    sign = excludes_zero(margin)
    if number(part(margin, "low")) is None:
        return Statement("One prompt is too few for an interval: nothing can be said from it.", "open")
    if sign < 0:
        return Statement("The margin fell, clear of zero: the model leans more to the wrong answers than before.", "bad")
    if sign == 0:
        return Statement("The margin's change cannot be told from chance.", "open")
    rejected, chosen = (excludes_zero(change.get(f"{side}_logp")) for side in ("rejected", "chosen"))
    if chosen < 0:
        return Statement("The margin rose while the chosen answers became less likely: the model was pushed away from both kinds.", "warn")
    what = {1: "both kinds of answers became likelier, the chosen ones more", -1: "rejected answers became less likely", 0: ""}[rejected]
    return Statement(f"The margin rose, clear of zero{f': {what}' if what else ''}.", "good")


def parting(before: Record, after: Record) -> Figure | None:
    """Log-probabilities of chosen and rejected answers, before and after, with intervals."""
    whens = [(name, one) for name, one in (("before", before), ("after", after)) if one]
    if len(whens) < 2:
        return None
    traces = []
    for side, colour in (("chosen", "var(--first)"), ("rejected", "var(--second)")):
        values = [part(one, f"{side}_logp") for _, one in whens]
        points = [number(part(value, "value")) for value in values]
        if None in points:
            return None
        line = {"color": colour, "width": 3}
        traces.append(
            {"type": "scatter", "mode": "lines+markers", "name": side, "x": [name for name, _ in whens], "y": points, "line": line}
            | {"marker": {"size": 9, "color": colour}, "error_y": error_bar(values, colour)}
        )
    axis = {"range": [-0.35, 1.35], "type": "category"}
    return figure("Chosen and rejected answers, before and after", traces, y="log-probability, nats per token", xaxis=axis)


def _pair_table(before: Record, after: Record, change: Record) -> Table:
    rows: list[Row] = []
    for key, words, style, better in METRICS:
        if key not in after or (key == "log_odds_accuracy" and after[key] == after.get("accuracy")):
            continue  # the two part only where a probability is 1
        moved = change.get(key)
        sign = excludes_zero(moved) * better
        cells: Row = [Cell(words), *([estimate(before.get(key), style)] if before else []), estimate(after[key], style)]
        if change:
            cells += [estimate(moved, "+.1%p" if "%" in style else style, tone={1: "good", -1: "bad"}.get(sign, "")), *bars([moved])]
        rows.append(cells)
    columns = ("", *(("before",) if before else ()), "after", *(("change", "change, from 0") if change else ()))
    note = power(change.get("accuracy"), "a change of accuracy", num=after.get("num_prompts"))
    return Table(columns, rows, note=f"{note}." if note else "")


def answer_section(results: Mapping[str, Record], demo: Record) -> Section:
    """Answers before and after: the demo's, then those of every result that shows some, a judge's verdicts first."""
    section = Section("answers", "Answers, before and after", short="Answers")
    shown = {"result": {"answers": items(demo, "answers")}, "show": {"answers": _DEMO_ANSWERS}}
    noted = sorted(results.values(), key=lambda record: not part(record, "show", "answers", "note"))
    for record in (shown, *noted):
        section.answers += answers_of(record)
    left_out = len(section.answers) - _MOST_ANSWERS
    if left_out > 0:
        section.lead.append(f"{left_out} more are in the folder eval.")
        del section.answers[_MOST_ANSWERS:]
    return section


_DEMO_ANSWERS = {"key": "answers", "versions": [["before", "before"], ["after", "after"]]}
