"""What `gpu.py` prints and draws of its results."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

GOALS = {"Qwen2.5-3B, HH": 2.5, "Qwen2.5-3B, long prompt": 2.0, "Qwen2.5-3B, UltraFeedback": 1.6}
"""Pairs per second over the best of TRL's arms, those with Liger's kernels among them."""


def table(results: dict[str, Any]) -> str:
    """One table of all cells, and what is to be said of each."""
    lines = [
        f"{_where(results)}; products at {results['matmul_flops'] / 1e12:.3g} TFLOP/s",
        *([told_of_tests(results["tests"])] if "tests" in results else []),
        "",
        "| cell | arm | rows | pairs/s | tokens/s | peak GB | GB at 2 rows | of products | of 989 | host |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, arms in results["cells"].items():
        lines += [f"| {cell} | {name} | {_figures(result)} |" for name, result in arms.items()]
    if any(result.get("is_estimate") for arms in results["cells"].values() for result in arms.values()):
        lines += ["", "≈: from the last step of the warm-up; there was no time for one that counts."]
    return "\n".join([*lines, "", *verdicts(results)])


def _where(results: dict[str, Any]) -> str:
    return str(results["environment"].get("device", "a CPU: nothing here says anything of a GPU"))


def told_of_tests(tests: dict[str, Any]) -> str:
    """What came of the tests that need a GPU."""
    counts = ", ".join(f"{tests[word]} {word}" for word in ("passed", "failed", "skipped"))
    stopped = " (stopped at its limit)" if tests["code"] is None else ""
    names = "".join(f"\n  failed: {name}" for name in tests["who_failed"])
    return f"cuda tests: {counts} in {tests['seconds']:.0f} s{stopped}{names}"


def _figures(result: dict[str, Any]) -> str:
    for word in ("cannot", "skipped", "failed"):
        if word in result:
            return f"{word}: {result[word]} | | | | | | |"
    if "pairs_per_s" not in result:
        return "no time left | | | | | | |"
    memory = [f"{result[name]:.1f}" if name in result else "" for name in ("peak_gb", "common_gb")]
    shares = [f"{result[name]:.1%}" for name in ("share_of_matmul", "mfu_of_989", "host_share")]
    about = "≈ " if result["is_estimate"] else ""
    return " | ".join(
        [str(result["micro_rows"]), f"{about}{result['pairs_per_s']:.2f}", f"{result['tokens_per_s']:,.0f}", *memory, *shares]
    )


def verdicts(results: dict[str, Any]) -> list[str]:
    """The best of ours over the best of the others, beside the goal; and a faster one of ours that was not measured in turns with it."""
    lines = []
    for cell, arms in results["cells"].items():
        done = {name: result for name, result in arms.items() if "pairs_per_s" in result}
        ours, others = ({name: done[name] for name in done if name.startswith("orpo") == is_ours} for is_ours in (True, False))
        if not ours or not others:
            continue
        later = {name: result for name, result in ours.items() if result.get("is_later")}
        ours = {name: result for name, result in ours.items() if name not in later} or ours
        best, rival = (max(arms, key=lambda name, arms=arms: arms[name]["pairs_per_s"]) for arms in (ours, others))
        goal = f" (goal {GOALS[cell]:g})" if cell in GOALS else ""
        about = "≈ " if ours[best]["is_estimate"] or others[rival]["is_estimate"] else ""
        line = f"{cell}: {best} {about}{ours[best]['pairs_per_s'] / others[rival]['pairs_per_s']:.2f} × {rival}{goal}"
        memory = [result["common_gb"] for result in others.values() if "common_gb" in result]
        if memory and "common_gb" in ours[best]:
            line += f", {ours[best]['common_gb'] / min(memory):.2f} × the leanest of the others in memory (goal 0.5)"
        faster = {name: result["pairs_per_s"] for name, result in later.items() if result["pairs_per_s"] > ours[best]["pairs_per_s"]}
        if faster:
            last = max(faster, key=lambda name, rates=faster: rates[name])
            line += f"; {last}, measured later, {faster[last] / others[rival]['pairs_per_s']:.2f} ×"
        lines.append(line)
    return lines


def figure(results: dict[str, Any]) -> str:
    """Bars of pairs per second, each cell against its own best, as an SVG."""
    rows: list[tuple[str, str, float, float]] = []
    for cell, arms in results["cells"].items():
        done = {name: result["pairs_per_s"] for name, result in arms.items() if "pairs_per_s" in result}
        rows += [(cell, name, value, value / max(done.values())) for name, value in done.items()]
    height = 22 * len(rows) + 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<text x="10" y="20">pairs per second, each cell against its best arm; {escape(_where(results))}</text>')
    for number, (cell, name, value, share) in enumerate(rows):
        y = 22 * number + 34
        colour = "#2563eb" if name.startswith("orpo") else "#9ca3af"
        parts.append(f'<text x="10" y="{y + 13}">{escape(cell)}: {escape(name)}</text>')
        parts.append(f'<rect x="420" y="{y}" width="{360 * share:.0f}" height="16" fill="{colour}"/>')
        parts.append(f'<text x="{428 + 360 * share:.0f}" y="{y + 13}">{value:.1f}</text>')
    return "\n".join([*parts, "</svg>", ""])
