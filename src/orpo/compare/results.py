"""From scores and costs to what a comparison says: summaries with intervals, verdicts only where intervals part, and the claims.

Scores of several seeds are put one after the other with the prompts as clusters, so that a prompt brings all its seeds along. A verdict
also needs every seed to point the same way: three seeds are too few to draw from, and enough to disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo.evaluate.bootstrap import Estimate, estimate_share, estimate_share_change
from orpo.evaluate.pairs import PairDifference, paired_difference, summarise
from orpo.report.sections import power

if TYPE_CHECKING:
    from orpo.compare.stage import StageSpec
    from orpo.data.types import TokenGroup

Scores = list[np.ndarray]
"""Per group, mean log-probability of each answer."""

METRICS = ("accuracy", "moved_accuracy", "margin", "log_odds_ratio", "chosen_logp", "rejected_logp")
WORDS = {
    "accuracy": "held-out accuracy",
    "moved_accuracy": "accuracy of the implicit reward",
    "margin": "margin",
    "log_odds_ratio": "log odds ratio",
    "chosen_logp": "log-probability of chosen answers",
    "rejected_logp": "log-probability of rejected answers",
}


@dataclass(frozen=True)
class Scored:
    """Scores of one method on the same groups, seed by seed, and of the starting weights."""

    groups: Sequence[TokenGroup]
    start: Scores
    seeds: list[Scores]

    def summary(self) -> dict[str, Any]:
        """Every metric over all seeds, with its interval over prompts and the span of the seeds."""
        count = len(self.seeds)
        pooled = summarise(list(self.groups) * count, _joined(self.seeds)).to_dict()
        pooled["moved_accuracy"] = _moved_estimate(self).to_dict()
        per_seed = [_values(self, seed) for seed in range(count)]
        return {
            "num_seeds": count,
            "num_pairs": pooled["num_pairs"] // count,
            **{name: {**pooled[name], "seeds": [values[name] for values in per_seed]} for name in METRICS},
        }

    def change(self) -> PairDifference:
        """From the starting weights, over all seeds."""
        count = len(self.seeds)
        return paired_difference(list(self.groups) * count, _joined([self.start] * count), _joined(self.seeds))


def _joined(seeds: Sequence[Scores]) -> Scores:
    return [score for scores in seeds for score in scores]


def moved_right(groups: Sequence[TokenGroup], before: Scores, after: Scores) -> tuple[list[float], list[bytes]]:
    """Per pair, whether the summed log-probability rose more for the chosen answer: DPO's implicit reward, whatever was trained.

    Source: DPO (arXiv 2305.18290), section 5: reward = beta * log(policy / reference), here with the common start as the reference.
    """
    found, prompts = [], []
    for group, old, new in zip(groups, before, after, strict=True):
        rise = [(float(b) - float(a)) * len(ids) for a, b, ids in zip(old, new, group.response_ids, strict=True)]
        for chosen, rejected in group.pairs:
            found.append(float(rise[chosen] > rise[rejected]))
            prompts.append(group.prompt_ids.tobytes())
    return found, prompts


def _moved_estimate(scored: Scored) -> Estimate:
    values: list[float] = []
    clusters: list[bytes] = []
    for scores in scored.seeds:
        found, prompts = moved_right(scored.groups, scored.start, scores)
        values += found
        clusters += prompts
    return estimate_share(values, clusters)


def _values(scored: Scored, seed: int) -> dict[str, float]:
    """Every metric of one seed, without intervals."""
    facts = summarise(scored.groups, scored.seeds[seed], num_bootstrap=1).to_dict()
    moved, _ = moved_right(scored.groups, scored.start, scored.seeds[seed])
    return {"moved_accuracy": sum(moved) / len(moved), **{name: facts[name]["value"] for name in METRICS if name != "moved_accuracy"}}


def compare_methods(first: str, second: str, scored: dict[str, Scored], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Verdicts of one method against another on the same pairs and seeds: first minus second."""
    one, two = scored[first], scored[second]
    count = len(one.seeds)
    both = paired_difference(list(one.groups) * count, _joined(two.seeds), _joined(one.seeds)).to_dict()
    both["moved_accuracy"] = _moved_difference(one, two).to_dict()
    per_seed = [(_values(one, seed), _values(two, seed)) for seed in range(count)]
    verdicts = []
    for metric in METRICS:
        difference = both[metric]
        signs = {np.sign(a[metric] - b[metric]) for a, b in per_seed}
        is_clear = difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0) and len(signs) == 1
        verdicts.append(
            {
                "metric": metric,
                "first": first,
                "second": second,
                "difference": difference,
                "is_clear": bool(is_clear),
                "text": _verdict_text(metric, labels[first], labels[second], difference, is_clear=bool(is_clear)),
            }
        )
    return verdicts


def _moved_difference(one: Scored, two: Scored) -> Estimate:
    ours: list[float] = []
    theirs: list[float] = []
    clusters: list[bytes] = []
    for mine, other in zip(one.seeds, two.seeds, strict=True):
        right, prompts = moved_right(one.groups, one.start, mine)
        ours += right
        theirs += moved_right(two.groups, two.start, other)[0]
        clusters += prompts
    return estimate_share_change(theirs, ours, clusters)


def _verdict_text(metric: str, first: str, second: str, difference: dict[str, Any], *, is_clear: bool) -> str:
    what = WORDS[metric]
    if not is_clear:
        style = ".1%p" if metric.endswith("accuracy") else ".3f"
        said = power(difference, "a difference", style, of="pairs and seeds")
        return f"{what}: {first} and {second} cannot be told apart on these pairs and seeds{f'; {said}' if said else ''}"
    word = "higher" if difference["value"] > 0 else "lower"
    if metric.endswith("accuracy"):
        points = [f"{100 * abs(difference[name]):.1f}" for name in ("value", "low", "high")]
        low, high = sorted(points[1:], key=float)
        return f"{what}: {first} is {points[0]} points {word} than {second} ({low} to {high})"
    low, high = sorted((abs(difference["low"]), abs(difference["high"])))
    return f"{what}: {first} is {abs(difference['value']):.3f} nats per token {word} than {second} ({low:.3f} to {high:.3f})"


# ---- the claims that are made for ORPO --------------------------------------------------------------------------------------------------


def judge_claims(methods: dict[str, dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is claimed for ORPO, and whether it held in this comparison: true, false, or null where nothing can be said.

    Args:
        methods: comparison.json's, with summaries and runs.
        verdicts: of all pairs of methods.
    """
    claims = []
    if "sft" in methods:
        claims.append(_sft_raises_both(methods["sft"]))
    if {"sft", "orpo"} <= methods.keys():
        claims.append(_by_verdict("ORPO parts chosen and rejected answers further than SFT", verdicts, "orpo", "sft", "margin"))
        claims.append(_by_verdict("ORPO prefers the chosen answer more often than SFT", verdicts, "orpo", "sft", "accuracy"))
    if {"sft+dpo", "orpo"} <= methods.keys():
        claims.append(_by_verdict("ORPO prefers the chosen answer more often than SFT + DPO", verdicts, "orpo", "sft+dpo", "accuracy"))
        claims.append(_by_verdict("ORPO leaves the chosen answers likelier than SFT + DPO", verdicts, "orpo", "sft+dpo", "chosen_logp"))
        claims += _language_claims(methods["orpo"], methods["sft+dpo"])
        claims += _cost_claims(methods["orpo"], methods["sft+dpo"])
    return claims


def _sft_raises_both(sft: dict[str, Any]) -> dict[str, Any]:
    change = sft["change"]
    rises = {side: change[f"{side}_logp"] for side in ("chosen", "rejected")}
    lows = [rise["low"] for rise in rises.values()]
    holds = None if None in lows else all(low > 0 for low in lows)
    if holds is False and not any(rise["high"] < 0 for rise in rises.values()):
        holds = None
    text = ", ".join(f"{side} {_signed(rise)}" for side, rise in rises.items())
    return {"claim": "SFT on the chosen answers raises the log-probability of the rejected ones too", "holds": holds, "evidence": text}


def _signed(estimate: dict[str, Any]) -> str:
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
    return f"{estimate['value']:+.3f}{interval}"


def _by_verdict(claim: str, verdicts: Sequence[dict[str, Any]], first: str, second: str, metric: str) -> dict[str, Any]:
    for verdict in verdicts:
        if (verdict["first"], verdict["second"], verdict["metric"]) == (first, second, metric):
            holds = verdict["difference"]["value"] > 0 if verdict["is_clear"] else None
            return {"claim": claim, "holds": holds, "evidence": verdict["text"]}
    return {"claim": claim, "holds": None, "evidence": "not measured"}


def _language_claims(orpo: dict[str, Any], other: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where `orpo eval --tasks retention` was asked for: perplexity of neutral text under the first seed's weights."""
    evaluations = [method["runs"][0].get("evaluations", {}) for method in (orpo, other)]
    if not all("retention" in found for found in evaluations):
        return
    ours, theirs = (found["retention"]["result"]["model"]["perplexity"] for found in evaluations)
    is_known = None not in (ours["low"], theirs["low"])
    yield {
        "claim": "ORPO keeps general language better than SFT + DPO",
        "holds": (True if ours["high"] < theirs["low"] else False if ours["low"] > theirs["high"] else None) if is_known else None,
        "evidence": " against ".join(f"{one['value']:.1f}{_span(one)}" for one in (ours, theirs)) + " of perplexity on neutral text",
    }


def _span(estimate: dict[str, Any]) -> str:
    return "" if estimate["low"] is None else f" ({estimate['low']:.1f} to {estimate['high']:.1f})"


def _cost_claims(orpo: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios of what was counted, over all stages; time and memory from runs that a busy machine may have disturbed."""

    def mean(method: dict[str, Any], name: str, *, last_stage: bool = False) -> float:
        costs = [run["stages"][-1] if last_stage else run["totals"] for run in method["runs"]]
        return float(np.mean([cost[name] for cost in costs]))

    passes = mean(orpo, "forward_passes") / mean(other, "forward_passes", last_stage=True)
    flops, time = (mean(orpo, name) / mean(other, name) for name in ("flops", "train_s"))
    memory = mean(orpo, "peak_bytes") / mean(other, "peak_bytes")
    return [
        {
            "claim": "ORPO halves the forward passes of DPO",
            "holds": passes <= 0.501,
            "evidence": f"{passes:.2f} times the answers computed forward in the DPO stage (policy and reference)",
        },
        {
            "claim": "ORPO needs less computation than SFT + DPO",
            "holds": flops < 1,
            "evidence": f"{flops:.2f} times its floating-point operations, {time:.2f} times its training time",
        },
        {
            "claim": "ORPO needs less memory than SFT + DPO",
            # A reference whose log-probabilities are computed beforehand is not in memory while DPO trains.
            "holds": True if memory < 0.9 else None if memory < 1.1 else False,
            "evidence": f"{memory:.2f} times its peak; the reference's log-probabilities were computed beforehand, not kept in memory",
        },
    ]


# ---- the sweep --------------------------------------------------------------------------------------------------------------------------


def sweep_table(trials: Sequence[dict[str, Any]], strength_name: str) -> dict[str, Any] | None:
    """Trials of a method as tables over learning rate and strength; None unless both vary."""
    rates = sorted({trial["options"]["learning_rate"] for trial in trials})
    strengths = sorted({trial["options"][strength_name] for trial in trials})
    if len(rates) < 2 or len(strengths) < 2:
        return None
    found = {(trial["options"]["learning_rate"], trial["options"][strength_name]): trial["validation"] for trial in trials}

    def table(name: str) -> list[list[float | None]]:
        return [[found[rate, strength][name]["value"] if (rate, strength) in found else None for strength in strengths] for rate in rates]

    return {"learning_rates": rates, "strengths": strengths, "margin": table("margin"), "accuracy": table("accuracy")}


def curve(stages: tuple[tuple[StageSpec, dict[str, Any]], ...]) -> Iterator[dict[str, Any]]:
    """Validation log-probabilities along all stages, by tokens spent in training so far."""
    spent = 0
    for number, (spec, result) in enumerate(stages):
        spent += result["cost"]["reference_tokens"]  # before the stage's first step
        tokens = [0, *result["cost"]["tokens_at_step"]]
        for line in (Path(spec.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            log = json.loads(line)
            if "eval_logps/chosen" in log and log["step"] < len(tokens):
                chosen, rejected = log["eval_logps/chosen"], log["eval_logps/rejected"]
                yield {
                    "stage": number,
                    "step": log["step"],
                    "tokens": spent + tokens[log["step"]],
                    "chosen_logp": chosen,
                    "rejected_logp": rejected,
                    "margin": chosen - rejected,
                    "accuracy": log["eval_rewards/accuracies"],
                }
        spent += tokens[-1]


def evaluations(folder: Path) -> dict[str, Any]:
    """What `orpo eval` has left beside a run, by task; answers shown one by one stay in their files."""
    found = {}
    for path in sorted((folder / "eval").glob("*.json")):
        # What is shared with others need not say whose machine it was.
        record = json.loads(path.read_text(encoding="utf-8").replace(f'"{Path.home()}/', '"~/'))
        if isinstance(record, dict) and isinstance(record.get("result"), dict):
            result = {name: value for name, value in record["result"].items() if name != "shown"}
            found[path.stem] = {**record, "result": result}
    return found


def weights(folder: Path) -> str:
    """Where a stage's final weights are: whole model or adapter."""
    from orpo.run.folder import final_weights

    return str(final_weights(folder) or folder / "model")
