"""The tables and figures of README.md, from `results/*.json`, so that no number is copied by hand.

`python benchmarks/comparison/tables.py rasbt` prints the tables; `--write` puts them between the marks of README.md, and NAME.svg there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
RESULTS = {path.stem: path for path in sorted((HERE / "results").glob("*.json"))}
_HOLDS = {True: "holds", False: "does not hold", None: "open"}


def tables(name: str) -> str:
    """All tables of one comparison, as Markdown."""
    facts = json.loads(RESULTS[name].read_text(encoding="utf-8"))
    parts = [_trials(facts), _scores(facts), _costs(facts), _evaluations(facts), _claims(facts), _verdicts(facts)]
    return "\n\n".join(part for part in parts if part)


def written(text: str) -> str:
    """The README with every part between `<!-- NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{tables(match[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def figure(name: str) -> str:
    """The paper's figure, one panel per method: log-probabilities of chosen and rejected validation answers over the tokens computed."""
    facts = json.loads(RESULTS[name].read_text(encoding="utf-8"))
    curves = {item["label"]: item["runs"][0]["curve"] for item in facts["methods"].values()}
    points = [point for curve in curves.values() for point in curve]
    values = [point[side] for point in points for side in _SIDES]
    low, high = min(values), max(values)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 280" font-family="sans-serif" font-size="12">',
        "<title>How chosen and rejected answers part</title>",
        f"<desc>Mean log-probability per token of validation answers while {', '.join(curves)} train.</desc>",
        '<rect width="960" height="280" fill="white"/>',
    ]
    for number, (label, curve) in enumerate(curves.items()):
        left, width, top, height = 60 + 228 * number, 200, 36, 190
        most = max(point["tokens"] for point in curve)

        def y(value: float, top: int = top, height: int = height) -> float:
            return top + height * (high - value) / (high - low)

        parts.append(f'<text x="{left}" y="22" font-size="14">{label}</text>')
        for tick in range(math.ceil(low), math.floor(high) + 1):
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
            if number == 0:
                parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
        second = next((before["tokens"] for before, point in pairwise(curve) if point["stage"] != before["stage"]), None)
        if second is not None:
            x = left + width * second / most
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}" stroke="#888" stroke-dasharray="2 3"/>')
        for side, colour in _SIDES.items():
            line = " ".join(f"{left + width * point['tokens'] / most:.1f},{y(point[side]):.1f}" for point in curve)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + width}" y="244" text-anchor="end">{most / 1000:.0f}k tokens</text>')
    for place, (side, colour) in enumerate(_SIDES.items()):
        parts.append(f'<text x="{60 + 80 * place}" y="268" fill="{colour}">{side.removesuffix("_logp")}</text>')
    parts.append('<text x="230" y="268">nats per token; dotted: the second stage begins</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


_SIDES = {"chosen_logp": "#1f5fa8", "rejected_logp": "#c8651b"}


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | list[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _scores(facts: dict[str, Any]) -> str:
    start, num_seeds = facts["start"]["test"], len(facts["options"]["seeds"])

    def row(label: str, scores: dict[str, Any], settings: str) -> list[str]:
        moved = _percent(scores["moved_accuracy"]) if "moved_accuracy" in scores else ""
        cells = [_percent(scores["accuracy"]), moved, *(_signed(scores[key]) for key in ("margin", "chosen_logp", "rejected_logp"))]
        return [label, settings, *cells]

    rows = [row("start", start, "")]
    rows += [row(item["label"], item["summary"], _settings(item["options"])) for item in facts["methods"].values()]
    title = f"Scores on {start['num_pairs']} test pairs, {num_seeds} seed{'s' if num_seeds > 1 else ''}, with 95 % intervals:"
    head = ["", "settings", "accuracy", "implicit reward", "margin", "chosen", "rejected"]
    return f"{title}\n\n{_table(head, rows)}"


def _trials(facts: dict[str, Any]) -> str:
    def rows() -> Iterator[list[str]]:
        for item in facts["methods"].values():
            for trial in item["trials"]:
                mark = " (chosen)" if trial["options"] == item["options"] else ""
                scores = trial["validation"]
                yield [item["label"] + mark, _settings(trial["options"]), _percent(scores["accuracy"]), _signed(scores["log_odds_ratio"])]

    data = facts["data"]
    limit = facts["options"]["split"]["tune_rows"]
    title = (
        f"{data['num_train']} training, {data['num_validation']} validation and {data['num_test']} test pairs. "
        f"Trials on {limit} training pairs, on the validation pairs:"
    )
    return f"{title}\n\n{_table(['', 'settings', 'accuracy', 'log odds ratio'], list(rows()))}"


def _costs(facts: dict[str, Any]) -> str:
    def rows() -> Iterator[list[str]]:
        for item in facts["methods"].values():
            totals = [run["totals"] for run in item["runs"]]
            mean = {name: sum(total[name] for total in totals) / len(totals) for name in totals[0]}
            yield [
                item["label"],
                f"{mean['forward_passes']:,.0f}",
                f"{mean['backward_passes']:,.0f}",
                f"{mean['forward_tokens'] + mean['reference_tokens']:,.0f}",
                f"{mean['flops'] / 1e12:.1f}",
                f"{mean['train_s'] + mean['reference_s']:.0f}",
                f"{mean['peak_bytes'] / 1e9:.2f}",
            ]

    head = ["", "answers forward", "answers backward", "tokens", "TFLOP", "seconds", "peak GB"]
    return f"Cost of a run, all stages, mean over seeds:\n\n{_table(head, list(rows()))}"


def _evaluations(facts: dict[str, Any]) -> str:
    columns = [("start", facts["start"]["evaluations"])]
    columns += [(item["label"], item["runs"][0]["evaluations"]) for item in facts["methods"].values()]
    rows = []
    for label, found in columns:
        if "retention" not in found and "ifeval" not in found:
            return ""
        retention = found.get("retention", {}).get("result", {}).get("model")
        ifeval = found.get("ifeval", {}).get("result")
        cells = [""] * 4
        if retention:
            cells = [
                _plain(retention["perplexity"], ".2f"),
                _plain(retention["answers"]["mean_tokens"], ".0f"),
                _percent(retention["answers"]["repetition"]),
                _percent(retention["answers"]["cut"]),
            ]
        if ifeval:
            cells += [_percent(ifeval[key]) for key in ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")]
            cells.append(str(ifeval["num_cut"]))
        rows.append([label, *cells])
    head = ["", "perplexity of neutral text", "tokens of answers", "repeated, %", "not ended, %"]
    if len(rows[0]) > len(head):
        head += ["IFEval prompts, strict", "instructions, strict", "prompts, loose", "instructions, loose", "answers cut"]
    return f"The first seed's runs, evaluated:\n\n{_table(head, rows)}"


def _claims(facts: dict[str, Any]) -> str:
    rows = [[item["claim"], _HOLDS[item["holds"]], item["evidence"]] for item in facts["claims"]]
    return _table(["claim", "here", "what was seen"], rows)


def _verdicts(facts: dict[str, Any]) -> str:
    lines = [f"- {item['text']}" for item in facts["verdicts"] if item["metric"] in ("accuracy", "moved_accuracy", "margin")]
    return "\n".join(lines)


def _settings(options: dict[str, float] | None) -> str:
    short = {"learning_rate": "lr", "orpo_alpha": "λ", "beta": "β"}
    return ", ".join(f"{short.get(name, name)} {value:g}" for name, value in (options or {}).items())


def _plain(estimate: dict[str, Any], style: str) -> str:
    if estimate["low"] is None:
        return format(estimate["value"], style)
    return f"{estimate['value']:{style}} ({estimate['low']:{style}} to {estimate['high']:{style}})"


def _percent(estimate: dict[str, Any]) -> str:
    scaled = {name: None if estimate[name] is None else 100 * estimate[name] for name in ("value", "low", "high")}
    return _plain(scaled, ".1f")


def _signed(estimate: dict[str, Any]) -> str:
    return _plain(estimate, "+.3f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=list(RESULTS))
    parser.add_argument("--write", action="store_true", help="into README.md")
    args = parser.parse_args()
    if args.write:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
        for name in RESULTS:
            (HERE / f"{name}.svg").write_text(figure(name), encoding="utf-8")
    else:
        for name in [args.name] if args.name else RESULTS:
            print(tables(name))


if __name__ == "__main__":
    main()
