"""Curves of a run, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orpo.report.facts import Logs, RunFacts
from orpo.report.sections import Section, number, part
from orpo.webpage import Figure, figure, label

_MOST_POINTS = 1200
"""More are averaged in bins, so that a long run makes no heavy page."""
_SMOOTH_FROM = 40
"""Curves with so many points are drawn faint, with a running mean over them."""
_WINDOW_SHARE = 20

CHOSEN, REJECTED = "var(--first)", "var(--second)"


def curve_section(facts: RunFacts) -> Section:
    """All curves that the logs have something for."""
    logs = facts.logs
    section = Section("curves", "Curves")
    section.figures = {
        "loss": _loss(logs, facts.preference, number(part(facts.run, "router", "aux_loss_coef")) or 0.0),
        "logps": _sides(logs),
        "odds": _one(logs, "log_odds_chosen", "Log odds ratio", "nats", "how much higher the odds of the chosen answer are", zero=True),
        "accuracy": _one(
            logs, "rewards/accuracies", "Accuracy", "", "share of pairs whose chosen answer is the likelier one", percent=True
        ),
        "share": _shares(logs, facts.preference) if facts.preference else None,
        "experts": _experts(logs),
        "speed": _one(
            logs, "tokens_per_second", "Speed", "tokens per second", "packed tokens, evaluation and saving left out", from_zero=True
        ),
        "norm": _one(logs, "grad_norm", "Gradient norm", "", "before clipping", from_zero=True),
        "rate": _one(logs, "learning_rate", "Learning rate", "", "", from_zero=True, exponent=True),
    }
    if any(section.figures.values()):
        section.lead.append(
            "From metrics.jsonl, over optimizer steps. Every point is the mean since the log before; dashed, with rings: held-out rows."
        )
        if len(logs.training) >= _SMOOTH_FROM:
            section.lead.append("Bold lines are running means over the faint ones.")
    return section


def lines(
    steps: Sequence[float], values: Sequence[float], name: str, colour: str, *, dash: str = "solid", smooth: bool = True
) -> list[dict[str, Any]]:
    """A curve: as it is where it has few points, else faint with a running mean over it."""
    if not values:
        return []
    x, y = thinned(steps, values)
    shown = {"type": "scatter", "mode": "lines" if len(x) > 2 else "lines+markers", "name": label(name)}
    line = {"color": colour, "width": 2, "dash": dash}
    if not smooth or len(x) < _SMOOTH_FROM:
        mode = "lines+markers" if dash != "solid" else shown["mode"]
        # A short run has one point of each, where no dash is to be seen.
        marker = {"color": colour, "size": 5} if dash == "solid" else {"color": colour, "size": 8, "symbol": "circle-open"}
        return [{**shown, "mode": mode, "x": x, "y": _rounded(y), "line": line, "marker": marker}]
    faint = {**shown, "x": x, "y": _rounded(y), "line": {**line, "width": 1}, "opacity": 0.28, "showlegend": False, "hoverinfo": "skip"}
    return [faint, {**shown, "x": x, "y": _rounded(running_mean(y, max(3, len(y) // _WINDOW_SHARE))), "line": line}]


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_MOST_POINTS` points: means of neighbours."""
    size = -(-len(values) // _MOST_POINTS)
    if size <= 1:
        return list(steps), list(values)
    bins = range(0, len(values), size)
    return [steps[min(start + size, len(steps)) - 1] for start in bins], [_mean(values[start : start + size]) for start in bins]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred means over `width` values, over fewer at both ends."""
    half = width // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, place - half), min(len(values), place + half + 1)) for place in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(values: Sequence[float]) -> list[float]:
    """Six digits: enough to look at, and half the page."""
    return [float(f"{value:.6g}") for value in values]


def _held_out(logs: Logs, name: str, told: str, colour: str) -> list[dict[str, Any]]:
    """The same quantity on evaluation rows, one dashed line per evaluation set."""
    traces = []
    for prefix in logs.evaluation_prefixes:
        which = prefix.removeprefix("eval_").strip("_")
        traces += lines(*logs.series(prefix + name), f"{told}, held out{f' ({which})' if which else ''}", colour, dash="dash", smooth=False)
    return traces


def _loss(logs: Logs, preference: str | None, router_coef: float) -> Figure | None:
    """The loss and its parts; of an objective that has not both, only the next-token loss beside it."""
    traces = lines(*logs.series("loss"), "loss", "var(--ink)")
    traces += lines(*logs.series("nll_loss"), "next-token loss", CHOSEN)
    if preference is not None:
        known = []
        for record in logs.training:
            step, loss, nll = (number(record.get(name)) for name in ("step", "loss", "nll_loss"))
            if step is not None and loss is not None and nll is not None:
                known.append((step, loss - nll - router_coef * (number(record.get("aux_loss")) or 0.0)))
        traces += lines([step for step, _ in known], [value for _, value in known], f"{preference}, weighed", REJECTED)
    if router_coef:
        steps, values = logs.series("aux_loss")
        traces += lines(steps, [router_coef * value for value in values], "router's loss, weighed", "var(--soft)")
    traces += _held_out(logs, "loss", "loss", "var(--soft)")
    return figure("Loss and its parts", traces, x="step", y="nats", note="" if preference is None else "the loss is the sum of its parts")


def _experts(logs: Logs) -> Figure | None:
    """How evenly a mixture of experts spreads its tokens."""
    traces = lines(*logs.series("experts/busiest"), "busiest expert", CHOSEN)
    traces += lines(*logs.series("experts/idlest"), "idlest expert", REJECTED)
    note = "tokens of the busiest and of the idlest expert of any layer, in those of an even spread (1)"
    return figure("Load of the experts", traces, x="step", y="loads", note=note, yaxis={"rangemode": "tozero"}) if traces else None


def _sides(logs: Logs) -> Figure | None:
    traces = lines(*logs.series("logps/chosen"), "chosen", CHOSEN) + lines(*logs.series("logps/rejected"), "rejected", REJECTED)
    traces += _held_out(logs, "logps/chosen", "chosen", CHOSEN) + _held_out(logs, "logps/rejected", "rejected", REJECTED)
    return figure("Log-probability of the answers", traces, x="step", y="nats per token", note="of the pairs trained on, and held out")


def _one(
    logs: Logs,
    name: str,
    title: str,
    y: str,
    note: str,
    *,
    zero: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    exponent: bool = False,
) -> Figure | None:
    traces = lines(*logs.series(name), "training" if logs.evaluation_prefixes and (zero or percent) else title.lower(), CHOSEN)
    traces += _held_out(logs, name, title.lower(), CHOSEN)
    axis: dict[str, Any] = {"rangemode": "tozero"} if from_zero else {}
    if exponent:
        axis["tickformat"] = ".1e"
    if percent:
        axis = {"range": [-0.02, 1.02], "tickformat": ".0%"}
    shapes = []
    if zero or percent:
        middle = 0.5 if percent else 0
        style = {"color": "var(--soft)", "width": 1, "dash": "dot"}
        shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": middle, "y1": middle, "line": style}]
    return figure(
        title, traces, x="step", y=y, note=note, yaxis=axis, shapes=shapes, showlegend=len({trace["name"] for trace in traces}) > 1
    )


def _shares(logs: Logs, preference: str) -> Figure | None:
    steps, values = logs.series("grad_share/odds_ratio")
    if not values:
        return None
    x, y = thinned(steps, values)
    y = running_mean(y, max(3, len(y) // _WINDOW_SHARE)) if len(y) >= _SMOOTH_FROM else y
    both = ((preference, y, REJECTED), ("next-token loss", [1 - value for value in y], CHOSEN))
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "one",
            "name": name,
            "x": x,
            "y": _rounded(part),
            "line": {"color": colour, "width": 1},
        }
        for name, part, colour in both
    ]
    axis = {"range": [0, 1], "tickformat": ".0%"}
    return figure("Gradient share of the two terms", traces, x="step", note="norms of their parts of the derivative", yaxis=axis)
