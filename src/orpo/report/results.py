"""What `orpo eval` and the demo found, as sections: held-out pairs, retention, IFEval, and what judges said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo.report.sections import (
    Answers,
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
    show,
    text,
)
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
_MOST_CHARS = 4000


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
    if not after:
        return section
    count = text(after.get("num_pairs"), "?")
    section.lead.append(f"{count} pairs that were not trained on: {source}. Intervals: 95 %, bootstrap over prompts.")
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
    rejected = excludes_zero(change.get("rejected_logp"))
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


def error_bar(values: Sequence[Any], colour: str) -> Record:
    """plotly's error bar from estimates; no bar where there is no interval."""
    triples = [[number(part(value, key)) for key in ("low", "value", "high")] for value in values]
    up = [high - middle if middle is not None and high is not None else 0 for _, middle, high in triples]
    down = [middle - low if middle is not None and low is not None else 0 for low, middle, _ in triples]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 5}


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
    return Table(columns, rows)


def slice_section(results: Mapping[str, Record]) -> Section:
    """Held-out pairs by length difference, or by columns of the rows."""
    section = Section("slices", "Held-out pairs in slices", short="Slices")
    for by, found in parts(results.get("pairs"), "result", "slices").items():
        named = [(name, value) for name, value in parts(found).items() if isinstance(value, Mapping)]
        if not named:
            continue
        drawn = bars([part(value, "margin") for _, value in named])
        rows: list[Row] = [
            [
                Cell(str(name)),
                text(part(value, "num_pairs"), "–"),
                estimate(part(value, "accuracy"), ".1%"),
                estimate(part(value, "margin"), "+.3f"),
                bar,
            ]
            for (name, value), bar in zip(named, drawn, strict=True)
        ]
        section.tables.append(Table((str(by).replace("_", " "), "pairs", "accuracy", "margin", "margin, from 0"), rows))
    return section


_RETENTION = (
    ("mean_tokens", "tokens of an answer", ".1f"),
    ("cut", "answers cut at the limit", ".1%"),
    ("empty", "empty answers", ".1%"),
    ("repetition", "repeated runs of four words", ".1%"),
    ("loops", "answers that loop", ".1%"),
)


def retention_section(results: Mapping[str, Record]) -> Section:
    """Perplexity on neutral text, and the shape of answers, before and after."""
    section = Section("retention", "What was kept: neutral text, and the shape of answers", short="Retention")
    found = parts(results.get("retention"), "result")
    before, after, change = parts(found, "against"), parts(found, "model"), parts(found, "change")
    if not after:
        return section
    sign = excludes_zero(change.get("nll"))
    if change.get("nll") is not None:
        said = {
            1: "The model predicts neutral text worse than before, clear of zero: it forgot something.",
            0: "No forgetting that could be told from chance on neutral text.",
        }
        said[-1] = "The model predicts neutral text better than before, clear of zero."
        section.statements.append(Statement(said[sign], {1: "bad", 0: "good", -1: "good"}[sign]))
    rows: list[Row] = []
    for key, words, style in (("perplexity", "perplexity", ".2f"), ("nll", "nats per token", ".3f")):
        rows.append(_three(words, before.get(key), after.get(key), change.get(key), style, is_better=-1))
    rows.append([Cell("bits per byte"), show(before.get("bits_per_byte")), show(after.get("bits_per_byte")), Cell("")])
    for key, words, style in _RETENTION:
        rows.append(_three(words, part(before, "answers", key), part(after, "answers", key), change.get(key), style, is_better=0))
    section.tables.append(Table(("", "before", "after", "change"), rows))
    return section


def _three(words: str, before: Any, after: Any, change: Any, style: str, *, is_better: int) -> Row:
    tone = {1: "good", -1: "bad"}.get(excludes_zero(change) * is_better, "")
    moved = estimate(change, f"+{style}p" if style.endswith("%") else f"+{style}", tone=tone) if change is not None else Cell("")
    return [Cell(words), estimate(before, style), estimate(after, style), moved]


# ---- answers side by side --------------------------------------------------------------------------------------------------------------


def answer_section(results: Mapping[str, Record], demo: Record) -> Section:
    """Answers before and after, from the demo, retention and custom prompts."""
    section = Section("answers", "Answers, before and after", short="Answers")
    sources = (
        (items(demo, "answers"), (("before", "before"), ("after", "after"))),
        (items(results.get("custom"), "result", "shown"), (("against", _against(results)), ("model", "this model"))),
        (items(results.get("retention"), "result", "shown"), (("against", "before"), ("model", "after"))),
    )
    for rows, names in sources:
        for row in rows:
            versions = [(told, _clipped(text(part(row, key)))) for key, told in names if isinstance(part(row, key), str)]
            if versions:
                section.answers.append(Answers(_clipped(text(part(row, "prompt"))), versions, text(part(row, "outcome"))))
    left_out = len(section.answers) - _MOST_ANSWERS
    if left_out > 0:
        section.lead.append(f"{left_out} more are in the folder eval.")
        del section.answers[_MOST_ANSWERS:]
    return section


def _against(results: Mapping[str, Record]) -> str:
    return text(part(results.get("custom"), "result", "against"), "the other").rstrip("/").rpartition("/")[2]


def _clipped(whole: str) -> str:
    return whole if len(whole) <= _MOST_CHARS else whole[:_MOST_CHARS] + " …"
