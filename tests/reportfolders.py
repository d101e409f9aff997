"""Folders of runs and comparisons as training, evaluation and comparison leave them, made of numbers, for tests of the report.

Every text that comes from data, models, judges or names can be set (`said`), so that one test can put markup everywhere at once.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import orpo.evaluate.tasks  # noqa: F401  registers them
from orpo.evaluate.task import find_task
from orpo.objective import KINDS, ORPO

TASKS = ("pairs", "retention", "ifeval", "mtbench", "alpacaeval", "custom")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def estimate(value: float, half: float | None = 0.1) -> dict[str, float | None]:
    return {"value": value, "low": None if half is None else value - half, "high": None if half is None else value + half}


def summary(accuracy: float, chosen: float, rejected: float) -> dict[str, Any]:
    return {
        "num_pairs": 60,
        "num_prompts": 60,
        "accuracy": estimate(accuracy, 0.08),
        "log_odds_accuracy": estimate(accuracy, 0.08),
        "margin": estimate(chosen - rejected, 0.15),
        "log_odds_ratio": estimate(1.02 * (chosen - rejected), 0.16),
        "chosen_logp": estimate(chosen, 0.09),
        "rejected_logp": estimate(rejected, 0.11),
    }


def change(accuracy: float, chosen: float, rejected: float) -> dict[str, Any]:
    found = summary(accuracy, chosen, rejected)
    del found["log_odds_accuracy"]
    return found


def logs(num_steps: int, every: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Logs of a run that learns: next-token loss falls, chosen and rejected part."""
    noise = random.Random(seed)
    records: list[dict[str, Any]] = []
    for step in range(every, num_steps + 1, every):
        done = 1 - math.exp(-3 * step / num_steps)
        chosen, rejected = -4.2 + 1.1 * done + noise.gauss(0, 0.12), -4.2 - 0.3 * done + noise.gauss(0, 0.12)
        nll, odds = 4.2 - 1.3 * done + noise.gauss(0, 0.08), 0.75 - 0.45 * done + noise.gauss(0, 0.05)
        records.append(
            {
                "step": step,
                "time_unix_s": 1795519300.0 + step,
                "loss": nll + odds,
                "grad_norm": 9 - 5 * done + noise.gauss(0, 0.5),
                "learning_rate": 5e-5 * (1 - step / num_steps),
                "nll_loss": nll,
                "logps/chosen": chosen,
                "logps/rejected": rejected,
                "rewards/accuracies": min(1.0, max(0.0, 0.45 + 0.5 * done + noise.gauss(0, 0.08))),
                "log_odds_ratio": -odds,
                "log_odds_chosen": 1.02 * (chosen - rejected),
                "grad_share/odds_ratio": 0.55 - 0.2 * done + noise.gauss(0, 0.02),
                "tokens_per_second": 300 + noise.gauss(0, 15),
                "pairs_per_second": 3.1 + noise.gauss(0, 0.15),
                "epoch": step / num_steps,
            }
        )
        if step % (num_steps // 4) == 0:
            records.append(
                {
                    "step": step,
                    "eval_loss": 5 - done,
                    "eval_nll_loss": 4.3 - done,
                    "eval_logps/chosen": -4.2 + done,
                    "eval_logps/rejected": -4.2 - 0.2 * done,
                    "eval_log_odds_chosen": 1.2 * done,
                    "eval_rewards/accuracies": 0.5 + 0.4 * done,
                }
            )
    records.append({"step": num_steps, "train_runtime": 412.5, "total_flos": 2.1e13, "train_loss": 4.1})
    return records


def run_facts(said: str = "") -> dict[str, Any]:
    """run.json."""
    data = {
        "num_rows": 310,
        "num_groups": 300,
        "num_pairs": 300,
        "num_sft_only": 0,
        "num_duplicates": 2,
        "dropped": {"empty_answer": 6, "too_long": 4},
        "notes": {"prompt_trimmed": 3},
        "examples": {"empty_answer": [[f"/home/me/pairs{said}.jsonl:17", said], ["/home/me/pairs.jsonl:90", ""]]},
        "lengths": {"prompt": {"mean": 52.8, "p50": 52.0, "p90": 58.0, "p99": 63.0, "max": 66.0}},
        "truncation": "drop",
        "warnings": [],
    }
    options = {
        "model_name_or_path": f"smollm2-135m-instruct{said}",
        "dataset_name": f"/home/me/secret-place/pairs{said}.jsonl",
        "learning_rate": 5e-5,
        "orpo_alpha": 1.0,
        "orpo_beta": 1.0,
        "nll_scope": "sequence",
        "use_peft": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2.0,
        "output_dir": f"/home/me/runs/x{said}",
    }
    origins = {"nll_scope": "default", "use_peft": "default", "gradient_accumulation_steps": "default", "orpo_beta": "default"}
    return {
        "format": 1,
        "status": "complete",
        "command": "train",
        "starts": [{"time_unix_s": 1795519300.0, "step": 0, "argv": ["train", f"recipe{said}.yaml", "--learning_rate", "5e-5"]}],
        "configuration": {key: {"value": value, "origin": origins.get(key, f"recipe{said}.yaml:3")} for key, value in options.items()},
        "versions": {"python": "3.11.7", "platform": f"Linux{said}", "orpo": "0.1.0", "torch": "2.13.0"},
        "device": {"type": "cpu", "threads": 2, "cores": 2, "capability": "AVX512"},
        "world_size": 1,
        "compute_dtype": "bfloat16",
        "engine": "shared",
        "seed": 42,
        "objective": KINDS["orpo"].facts(ORPO(1.0), "next-token loss (prompt and chosen answer)"),
        "num_steps": 80,
        "model": {
            "name": f"smollm2-135m-instruct{said}",
            "kind": "alias",
            "location": "/cache/smollm2",
            "revision": None,
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "num_parameters": 134515008,
            "stored_dtype": "Q4_1",
            "dtype": "float32",
            "device": "cpu",
            "quantization": None,
            "notes": [],
        },
        "data": {
            "fingerprint": "7d125cdb26df864f56ea0c037a22bb131d430bd407b04f46e102bb6a0a9f5abc",
            "train": data,
            "held_out": {"num_rows": 60, "num_groups": 60, "num_pairs": 60, "dropped": {}, "notes": {}},
            "num_held_out": 60,
            "template": {
                "template": f"tokenizer's chat template{said}",
                "max_length": 1024,
                "truncation": "drop",
                "terminator": "<|im_end|>",
            },
        },
        "starting_weights_sha256": "2c6b9cdac7be3e9088e9613254494ae5567c26cb4d4dc468e1e545fdd5fb6f9b",
        "ended_unix_s": 1795519712.0,
        "last_step": 80,
        "ended_by": None,
        "final_metrics": {},
    }


ANSWER = "Thank you for writing to us. Your parcel left our house on Monday, and it will be with you by Thursday. Can I do anything else?"


def shown_pair(said: str, seed: int) -> dict[str, Any]:
    """A pair token by token, as `orpo eval` keeps it."""
    noise = random.Random(seed)

    def side(words: str, rise: float) -> tuple[dict[str, Any], dict[str, Any]]:
        tokens = [f" {word}" for word in words.split(" ")] + ["\n", "<|im_end|>"]
        before = [round(-abs(noise.gauss(3.5, 2.5)), 4) for _ in tokens]
        after = [round(min(-0.001, value + noise.gauss(rise, 1.2)), 4) for value in before]
        return {"tokens": tokens, "logps": before}, {"tokens": tokens, "logps": after}

    chosen, rejected = side(ANSWER + said, 1.4), side("No idea, sorry. Look it up yourself on the web page" + said, -0.6)
    prompt = f"<|im_start|>user\nWhere is my parcel?{said}<|im_end|>\n<|im_start|>assistant\n"
    return {
        "where": f"/home/me/test{said}.jsonl:{seed}",
        "model": {"prompt": prompt, "chosen": chosen[1], "rejected": rejected[1]},
        "against": {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]},
    }


def results(said: str = "") -> dict[str, dict[str, Any]]:
    """What each task of `orpo eval` finds."""
    slices = {
        f"length difference{said}": {
            f"{name}{said}": summary(*value)
            for name, value in {
                "chosen shorter": (0.8, -3.2, -4.2),
                "about equal": (0.9, -3.0, -4.5),
                "chosen longer": (0.95, -3.1, -4.9),
            }.items()
        }
    }
    text = {"num_passages": 30, "num_tokens": 2000, "nll": estimate(3.1), "bits_per_byte": 1.02, "perplexity": estimate(22.2, 1.5)}
    shape = {
        name: estimate(value, value / 5)
        for name, value in {"mean_tokens": 60.0, "cut": 0.2, "empty": 0.01, "repetition": 0.04, "loops": 0.05}.items()
    }
    return {
        "pairs": {
            "data": f"rows that the run held out{said}",
            "rows": {"num_rows": 60, "dropped": {}, "notes": {}},
            "model": summary(0.917, -3.227, -4.524),
            "against": summary(0.417, -4.236, -4.215),
            "change": change(0.5, 1.009, -0.309),
            "slices": slices,
            "shown": [shown_pair(said, seed) for seed in range(4)],
        },
        "retention": {
            "text": f"neutral.txt{said}",
            "max_new_tokens": 128,
            "against": {**text, "answers": {"num_answers": 24, **shape}},
            "model": {**text, "answers": {"num_answers": 24, **shape}},
            "change": {"nll": estimate(0.02, 0.05), "mean_tokens": estimate(3.0, 5.0), "repetition": estimate(-0.01, 0.02)},
            "shown": [
                {"prompt": f"Name {n} colours.{said}", "against": f"Red.{said}", "model": f"Red and blue.\nGreen.{said}"} for n in range(9)
            ],
        },
        "ifeval": {
            "num_prompts": 100,
            "num_instructions": 155,
            "num_cut": 4,
            **{
                name: estimate(value, 0.07)
                for name, value in {
                    "prompt_strict": 0.2,
                    "prompt_loose": 0.24,
                    "instruction_strict": 0.33,
                    "instruction_loose": 0.36,
                }.items()
            },
            "by_kind": {
                f"{kind}{said}": {"num_instructions": n, "strict": n / 40}
                for n, kind in enumerate(("keywords", "punctuation", "length"), 9)
            },
        },
        "mtbench": {
            "generator": f"this-run{said}",
            "num_questions": 80,
            "score": estimate(3.1, 0.4),
            "by_turn": [estimate(3.4, 0.4), estimate(2.8, 0.5)],
            "by_category": {f"{name}{said}": estimate(2 + place * 0.7, 0.8) for place, name in enumerate(CATEGORIES)},
            "num_judged": 158,
            "num_malformed": 2,
            "num_unanswered": 0,
            "ratings": {},
        },
        "alpacaeval": {
            "generator": f"this-run{said}",
            "reference": f"gpt4_turbo{said}",
            "win_rate": estimate(0.08, 0.02),
            "num_instructions": 805,
            "num_judged": 800,
            "num_wins": 64,
            "num_ties": 0,
            "num_losses": 736,
            "length_controlled": 0.11,
            "length_controlled_error": 0.01,
            "missing": None,
            "mean_chars": 812.0,
            "reference_mean_chars": 2049.0,
            "num_malformed": 5,
            "num_unanswered": 0,
            "prompt": "published",
            "preferences": [],
        },
        "custom": {
            "against": f"runs/other{said}",
            "num_prompts": 20,
            "num_judged": 20,
            "win_rate": estimate(0.6, 0.15),
            "wins": estimate(0.5, 0.2),
            "ties": estimate(0.2, 0.1),
            "losses": estimate(0.3, 0.2),
            "num_inconsistent": 3,
            "first_place": 0.55,
            "num_malformed": 0,
            "num_unanswered": 0,
            "outcomes": [],
            "shown": [{"prompt": f"Hello{said}", "model": f"Hi!{said}", "against": f"Yo{said}", "outcome": f"win{said}"}],
        },
    }


def show_of(task: str, result: dict[str, Any]) -> dict[str, Any]:
    """What the task itself writes beside its result."""
    shown = find_task(task)().show(result)
    assert shown is not None
    return shown.to_dict()


def make_run(folder: Path, *, said: str = "", num_steps: int = 80, tasks: tuple[str, ...] = TASKS) -> Path:
    """A finished run with results of these tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", run_facts(said))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logs(num_steps)), encoding="utf-8")
    for task, result in results(said).items():
        if task in tasks:
            record = {
                "format": 1,
                "task": task,
                "target": f"/home/me/runs/x{said}",
                "answers": None,
                "judge": {"model": f"judge{said}"},
                "seed": 0,
                "limit": None,
                "versions": {},
                "time_unix_s": 1795519800.0,
                "wall_s": 31.5,
                "result": result,
                "show": show_of(task, result),
            }
            write_json(folder / "eval" / f"{task}.json", record)
    return folder


# ---- comparisons -----------------------------------------------------------------------------------------------------------------------

_METHODS = {
    "sft": ("SFT", None, 0.58, -3.3, -3.5),
    "sft+dpo": ("SFT + DPO", "beta", 0.81, -3.4, -4.3),
    "simpo": ("SimPO", "beta", 0.75, -3.9, -4.7),
    "orpo": ("ORPO", "orpo_alpha", 0.88, -3.25, -4.5),
}


def _method(name: str, said: str, num_seeds: int) -> dict[str, Any]:
    label, strength, accuracy, chosen, rejected = _METHODS[name]
    stages = ["sft", "dpo"] if name == "sft+dpo" else [name]
    options = {"learning_rate": 5e-5, **({strength: 1.0} if strength else {})}
    cost = {
        "num_steps": 76,
        "pairs": 600,
        "forward_tokens": 80000,
        "backward_tokens": 80000,
        "reference_tokens": 0,
        "forward_passes": 1200,
        "backward_passes": 1200,
        "flops": 6.5e13,
        "train_s": 300.0,
        "peak_bytes": 2 * 2**30,
    }
    runs = []
    for seed in range(num_seeds):
        noise = random.Random(f"{name}{seed}")
        curve = []
        for point in range(9):
            done = 1 - math.exp(-3 * point / 8)
            sides = {"chosen_logp": -4.2 + (chosen + 4.2) * done + noise.gauss(0, 0.03), "rejected_logp": -4.2 + (rejected + 4.2) * done}
            curve.append(
                {
                    "stage": int(point > 4 and len(stages) > 1),
                    "step": 10 * point,
                    "tokens": 10000 * point * len(stages),
                    **sides,
                    "margin": sides["chosen_logp"] - sides["rejected_logp"],
                    "accuracy": 0.5 + (accuracy - 0.5) * done,
                }
            )
        totals = {key: value * len(stages) if key != "peak_bytes" else value for key, value in cost.items()}
        runs.append(
            {
                "id": f"{name}-seed{seed}{said}",
                "seed": seed,
                "folder": f"runs/{name}-seed{seed}{said}",
                "stages": [{"objective": stage, **cost} for stage in stages],
                "totals": totals,
                "test": summary(accuracy, chosen, rejected),
                "change": change(accuracy - 0.42, chosen + 4.2, rejected + 4.2),
                "curve": curve,
                "evaluations": {
                    "ifeval": {"task": "ifeval", "result": results(said)["ifeval"], "show": show_of("ifeval", results(said)["ifeval"])}
                },
            }
        )
    trial = {"id": f"{name}-1{said}", "options": options, "validation": summary(accuracy - 0.02, chosen, rejected)}
    return {
        "label": f"{label}{said}",
        "strength_name": strength,
        "options": options,
        "trials": [trial, {**trial, "options": {**options, "learning_rate": 1e-5}}],
        "runs": runs,
        "summary": {
            key: {**value, "seeds": [value["value"]] * num_seeds}
            for key, value in change(accuracy, chosen, rejected).items()
            if isinstance(value, dict)
        },
    }


def comparison_facts(said: str = "", *, num_seeds: int = 3) -> dict[str, Any]:
    """comparison.json of a finished comparison."""

    def table(top: float) -> list[list[float | None]]:
        return [[top * (1 - abs(row - 1) / 4 - abs(column - 1) / 5) for column in range(3)] for row in range(3)]

    return {
        "kind": "comparison",
        "format": 1,
        "status": "complete",
        "folder": f"/home/me/comparison{said}",
        "versions": {"python": "3.11.7", "orpo": "0.1.0", "torch": "2.13.0", "platform": f"Linux{said}"},
        "device": {"type": "cpu", "threads": 2},
        "configuration": {
            "model_name_or_path": {"value": f"smollm2-135m-instruct{said}", "origin": f"c{said}.yaml:1"},
            "dataset_name": {"value": f"/home/me/pairs{said}.jsonl", "origin": "flag"},
            "hub_token": "<redacted>",
        },
        "data": {
            "source": f"/home/me/pairs{said}.jsonl",
            "num_train": 254,
            "num_validation": 40,
            "num_test": 60,
            "fingerprint": "4e5f" * 16,
            "dropped": {"too_long": 3},
        },
        "start": {
            "model": f"smollm2-135m-instruct{said}",
            "sha256": "2c6b" * 16,
            "test": summary(0.42, -4.2, -4.2),
            "evaluations": {"ifeval": {"result": results(said)["ifeval"], "show": show_of("ifeval", results(said)["ifeval"])}},
        },
        "grid": {"learning_rate": [1e-5, 5e-5], "tune_pairs": 200, "seed": 7},
        "methods": {name: _method(name, said, num_seeds) for name in _METHODS},
        "verdicts": [
            {
                "metric": "margin",
                "first": "orpo",
                "second": "sft",
                "difference": estimate(1.05, 0.2),
                "is_clear": True,
                "text": f"margin: ORPO is 1.050 higher than SFT{said}",
            },
            {
                "metric": "accuracy",
                "first": "orpo",
                "second": "sft+dpo",
                "difference": estimate(0.03, 0.09),
                "is_clear": False,
                "text": f"cannot be told apart{said}",
            },
        ],
        "claims": [
            {"claim": f"SFT raises rejected log-probabilities{said}", "holds": True, "evidence": f"+0.7{said}"},
            {"claim": "ORPO needs less memory than SFT + DPO", "holds": False, "evidence": "1.00 times its peak"},
            {"claim": "ORPO prefers the chosen answer more often", "holds": None, "evidence": "not measured"},
        ],
        "sweep": {
            name: {"learning_rates": [1e-5, 5e-5, 1e-4], "strengths": [0.1, 0.5, 1.0], "margin": table(1.3), "accuracy": table(0.9)}
            for name in ("orpo", "sft+dpo")
        },
    }


def make_comparison(folder: Path, *, said: str = "") -> Path:
    """A finished comparison's folder."""
    write_json(folder / "comparison.json", comparison_facts(said))
    return folder
