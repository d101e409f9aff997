"""What `orpo eval` found beside held-out pairs, as sections: IFEval, and what judges said. Several models share the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    row,
    show,
    text,
)
from orpo.webpage import Figure, figure, label

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
_RETENTION = (
    ("mean_tokens", "tokens of an answer", ".1f"),
    ("cut", "answers cut at the limit", ".1%"),
    ("empty", "empty answers", ".1%"),
    ("repetition", "repeated runs of four words", ".1%"),
    ("loops", "answers that loop", ".1%"),
)

BEFORE = "before training"
"""Name of the starting model among several; it is drawn grey, and the others keep their colours."""


def result_sections(results: Mapping[str, Record], beside: Mapping[str, Mapping[str, Record]] | None = None) -> list[Section]:
    """A section for each result that is there.

    Args:
        results: task -> record.
        beside: other models' results by name, shown in the same MT-Bench and AlpacaEval figures.
    """
    others = beside or {}

    def everyone(task: str) -> dict[str, Record]:
        named = {_name(results[task]): parts(results[task], "result")} if task in results else {}
        return named | {name: parts(found[task], "result") for name, found in others.items() if task in found}

    sections = [slice_section(results), retention_section(results), ifeval_section(everyone("ifeval"))]
    sections += [mtbench_section(everyone("mtbench")), alpaca_section(everyone("alpacaeval")), custom_section(results)]
    for section, task in zip(sections, ("pairs", "retention", "ifeval", "mtbench", "alpacaeval", "custom"), strict=True):
        if task in results and not section.is_empty:
            section.lead.append(_circumstances(results[task]))
    return sections


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


_IFEVAL = (
    ("prompt_strict", "prompt, strict"),
    ("prompt_loose", "prompt, loose"),
    ("instruction_strict", "instruction, strict"),
    ("instruction_loose", "instruction, loose"),
)


def ifeval_section(everyone: Mapping[str, Record]) -> Section:
    """The four published accuracies, and strict ones by kind of instruction."""
    section = Section("ifeval", "IFEval: instructions that a program can check", short="IFEval")
    known = {name: found for name, found in everyone.items() if part(found, "prompt_strict") is not None}
    if not known:
        return section
    rows: list[Row] = [
        [Cell(name), text(found.get("num_prompts"), "–"), *(estimate(found.get(key), ".1%") for key, _ in _IFEVAL)]
        for name, found in known.items()
    ]
    section.tables.append(Table(("model", "prompts", *(words for _, words in _IFEVAL)), rows))
    traces = []
    for name, found in known.items():
        kinds = [(kind, number(part(value, "strict")), part(value, "num_instructions")) for kind, value in parts(found, "by_kind").items()]
        shown = [(f"{str(kind).replace('_', ' ')} ({text(count, '?')})", share) for kind, share, count in kinds if share is not None]
        if shown:
            names, shares = zip(*sorted(shown), strict=True)
            traces.append(bar_trace(name, shares, [label(one) for one in names], colour_of(name, known)))
    section.figures["kinds"] = figure(
        "Strict accuracy by kind of instruction",
        traces,
        xaxis={"tickformat": ".0%", "range": [0, 1]},
        yaxis={"autorange": "reversed"},
        showlegend=len(traces) > 1,
        height=90 + 26 * max((len(trace["y"]) for trace in traces), default=0) * max(1, len(traces)),
        barmode="group",
    )
    section.wide.add("kinds")
    cut = next((number(found.get("num_cut")) for found in known.values() if number(found.get("num_cut"))), None)
    if cut:
        section.lead.append(f"{cut:.0f} answers were cut at max_new_tokens.")
    return section


def colour_of(name: str, everyone: Iterable[str]) -> str:
    """The colour of a model among others."""
    others = [one for one in everyone if one != BEFORE]
    return f"var(--c{others.index(name) % 6})" if name in others else "var(--soft)"


def bar_trace(name: str, values: Sequence[Any], names: Sequence[str], colour: str, *, estimates: Sequence[Any] | None = None) -> Record:
    """Horizontal bars of one colour; names are labels already."""
    trace: Record = {"type": "bar", "orientation": "h", "name": label(name), "x": list(values), "y": list(names)}
    trace["marker"] = {"color": colour}
    if estimates is not None:
        trace["error_x"] = error_bar(estimates, "var(--soft)")
    return trace


def mtbench_section(everyone: Mapping[str, Record]) -> Section:
    """Scores from 1 to 10: a radar over the categories, and the table."""
    section = Section("mtbench", "MT-Bench", is_beside=True)
    known = {name: found for name, found in everyone.items() if part(found, "score") is not None}
    if not known:
        return section
    categories = list(dict.fromkeys(str(category) for found in known.values() for category in parts(found, "by_category")))
    traces = []
    for name, found in known.items():
        values = [number(part(found, "by_category", category, "value")) for category in categories]
        if len(categories) > 2:
            round_ = [label(category) for category in [*categories, categories[0]]]
            line = {"color": colour_of(name, known), "width": 2}
            traces.append(
                {
                    "type": "scatterpolar",
                    "name": label(name),
                    "r": [*values, values[0]],
                    "theta": round_,
                    "line": line,
                    "fill": "toself",
                    "opacity": 0.75,
                }
            )
    polar = {
        "radialaxis": {"range": [0, 10], "dtick": 2, "angle": 90, "tickangle": 90},
        "angularaxis": {"direction": "clockwise", "rotation": 90},
    }
    section.figures["radar"] = figure(
        "Scores by category",
        traces,
        note="1 to 10, as the judge grades",
        polar=polar,
        height=420,
        margin={"l": 70, "r": 70, "t": 40, "b": 40},
        showlegend=len(traces) > 1,
    )
    everyones = list(known.values())
    scores: list[tuple[str, list[Any]]] = [("all", [found.get("score") for found in everyones])]
    for turn in range(max(len(items(found, "by_turn")) for found in everyones)):
        scores.append((f"turn {turn + 1}", [dict(enumerate(items(found, "by_turn"))).get(turn) for found in everyones]))
    scores += [(category, [part(found, "by_category", category) for found in everyones]) for category in categories]
    section.tables.append(Table(("", *known), [row(words, *(estimate(value, ".2f") for value in values)) for words, values in scores]))
    _tell_gaps(section, known)
    return section


def alpaca_section(everyone: Mapping[str, Record]) -> Section:
    """Win rates over the reference, raw and length-controlled, as bars."""
    section = Section("alpacaeval", "AlpacaEval")
    known = {name: found for name, found in everyone.items() if part(found, "win_rate") is not None}
    if not known:
        return section
    names = [label(name) for name in known]
    rates = [found["win_rate"] for found in known.values()]
    controlled = [number(found.get("length_controlled")) for found in known.values()]
    traces = [bar_trace("win rate", [number(part(rate, "value")) for rate in rates], names, "var(--c0)", estimates=rates)]
    if any(rate is not None for rate in controlled):
        traces.append(bar_trace("length-controlled", controlled, names, "var(--c1)"))
    reference = text(next(iter(known.values())).get("reference"), "the reference")
    section.figures["winrate"] = win_figure(f"Win rate over {reference}", traces, len(known) * len(traces))
    rows: list[Row] = [
        [
            Cell(name),
            estimate(found["win_rate"], ".1%"),
            show(found.get("length_controlled"), ".1%"),
            "/".join(text(found.get(key), "–") for key in ("num_wins", "num_ties", "num_losses")),
            show(found.get("mean_chars"), ",.0f"),
            f"{text(found.get('num_judged'), '–')} of {text(found.get('num_instructions'), '–')}",
        ]
        for name, found in known.items()
    ]
    section.tables.append(Table(("model", "win rate", "length-controlled", "won/tied/lost", "characters", "judged"), rows))
    section.lead += [
        f"No length-controlled rate: {' '.join(text(found['missing']).split())}" for found in known.values() if text(found.get("missing"))
    ][:1]
    _tell_gaps(section, known)
    return section


def win_figure(title: str, traces: Sequence[Record], num_bars: int) -> Figure | None:
    """Bars from 0 to 100 %, with a line at one half."""
    half = {
        "type": "line",
        "x0": 0.5,
        "x1": 0.5,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "var(--soft)", "width": 1, "dash": "dot"},
    }
    axis = {"range": [0, 1], "tickformat": ".0%"}
    return figure(
        title, traces, xaxis=axis, yaxis={"autorange": "reversed"}, shapes=[half], height=120 + 44 * num_bars, showlegend=len(traces) > 1
    )


def custom_section(results: Mapping[str, Record]) -> Section:
    """Your own prompts against another run or model: won, tied, lost."""
    section = Section("custom", "Your own prompts, against another model", short="Own prompts")
    found = parts(results.get("custom"), "result")
    if part(found, "win_rate") is None:
        return section
    section.lead.append(f"Against {text(found.get('against'), 'another model')}; every pair is shown to the judge in both orders.")
    shares = [
        (key, number(part(found, key, "value")) or 0.0, colour)
        for key, colour in (("wins", "var(--c0)"), ("ties", "var(--grid)"), ("losses", "var(--c1)"))
    ]
    traces = [
        {"type": "bar", "orientation": "h", "name": key, "x": [share], "y": [""], "marker": {"color": colour}}
        for key, share, colour in shares
    ]
    section.figures["wins"] = figure("Won, tied, lost", traces, xaxis={"range": [0, 1], "tickformat": ".0%"}, barmode="stack", height=170)
    shares_row: Row = [Cell("share"), *(estimate(found.get(key), ".1%") for key in ("win_rate", "wins", "ties", "losses"))]
    section.tables.append(Table(("", "win rate", "won", "tied", "lost"), [shares_row]))
    if number(found.get("first_place")) is not None:
        section.lead.append(f"The judge took the answer shown first in {show(found['first_place'], '.0%')} of its decisions.")
    _tell_gaps(section, {"": found})
    return section


def _tell_gaps(section: Section, known: Mapping[str, Record]) -> None:
    for key, words in (("num_malformed", "verdicts could not be read"), ("num_unanswered", "questions got no reply")):
        total = sum(number(found.get(key)) or 0 for found in known.values())
        if total:
            section.lead.append(f"{total:.0f} {words}; they count for nothing.")


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


def answer_section(results: Mapping[str, Record], demo: Record) -> Section:
    """Answers before and after, from the demo, retention and custom prompts."""
    section = Section("answers", "Answers, before and after", short="Answers")
    sources = (
        (items(demo, "answers"), (("before", "before"), ("after", "after"))),
        (items(results.get("custom"), "result", "shown"), (("against", _against(results)), ("model", "this model"))),
        (items(results.get("retention"), "result", "shown"), (("against", "before"), ("model", "after"))),
    )
    for answers, names in sources:
        for answer in answers:
            versions = [(told, _clipped(text(part(answer, key)))) for key, told in names if isinstance(part(answer, key), str)]
            if versions:
                section.answers.append(Answers(_clipped(text(part(answer, "prompt"))), versions, text(part(answer, "outcome"))))
    left_out = len(section.answers) - _MOST_ANSWERS
    if left_out > 0:
        section.lead.append(f"{left_out} more are in the folder eval.")
        del section.answers[_MOST_ANSWERS:]
    return section


def _against(results: Mapping[str, Record]) -> str:
    return text(part(results.get("custom"), "result", "against"), "the other").rstrip("/").rpartition("/")[2]


def _clipped(whole: str) -> str:
    return whole if len(whole) <= _MOST_CHARS else whole[:_MOST_CHARS] + " …"
