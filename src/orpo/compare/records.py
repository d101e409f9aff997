"""What stages and evaluations have left in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.compare.stage import StageSpec


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
    from orpo.runner import final_weights

    return str(final_weights(folder) or folder / "model")
