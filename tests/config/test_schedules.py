"""What a configuration says of the schedule and of the best model is right or refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.trainer_utils import SchedulerType

from orpo import ORPOConfig
from orpo.config.checks import EVALUATED
from orpo.errors import UserError, UserErrors
from orpo.run.config import resolve

BASE = {"model_name_or_path": "m", "dataset_name": "rows.jsonl", "eval_fraction": 0.1, "eval_strategy": "epoch", "use_cpu": True}
NAMES = [str(kind.value) for kind in SchedulerType]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"min_lr": 1e-6},
    {"min_lr": "x"},
    {"min_lr_rate": 0.1, "num_cycles": 0.5},
    {"num_decay_steps": 10},
    {"num_decay_steps": 10, "num_stable_steps": 5, "min_lr_ratio": 0.1},
    {"num_decay_steps": 10, "decay_type": "nothing"},
    {"num_cycles": 2},
    {"power": 2.0, "lr_end": 1e-7},
    {"lr_end": 1.0},
    {"timescale": 100},
    {"factor": 0.5, "patience": 2},
    {"nothing": 1},
]


def is_made(name: str, arguments: dict[str, Any]) -> bool:
    """Whether transformers makes the schedule and takes the steps of a short run with it."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8e-6)
    try:
        schedule = get_scheduler(name, optimizer, 4, 40, scheduler_specific_kwargs=arguments)
        for _ in range(40):
            optimizer.step()
            schedule.step(1.0) if name in ("reduce_lr_on_plateau", "greedy") else schedule.step()
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_passes_is_made_and_what_is_refused_is_not(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "max_steps": 40, "lr_scheduler_type": name, "lr_scheduler_kwargs": arguments or None}))
    takes_none = name in ("constant", "constant_with_warmup")  # transformers passes nothing on to these, so that it would be lost
    if is_made(name, arguments) and not (takes_none and arguments):
        resolve(path)
        return
    with pytest.raises(UserErrors, match=f"what {name} takes"):
        resolve(path)


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "'1e-6'", ".000001"])
def test_numbers_in_a_mapping_of_the_file(text: str, tmp_path: Path) -> None:
    keys = "".join(f"{key}: {json.dumps(value)}\n" for key, value in BASE.items())
    path = tmp_path / "run.yaml"
    path.write_text(f"{keys}lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {{min_lr: {text}, num_cycles: 0.5}}\n")
    config = resolve(path)
    assert config["lr_scheduler_kwargs"] == {"min_lr": 1e-6, "num_cycles": 0.5}
    assert config.training_args().lr_scheduler_kwargs == {"min_lr": 1e-6, "num_cycles": 0.5}


@pytest.mark.parametrize("text", ["min_lr=1e-6", "{min_lr: 1e-6}", '{"min_lr": 1e-6}', "min_lr=0.000001"])
def test_numbers_in_a_mapping_of_a_flag(text: str) -> None:
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--lr_scheduler_type", "cosine_with_min_lr"]
    assert resolve(None, [*flags, "--lr_scheduler_kwargs", text])["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


def test_texts_of_a_mapping_that_are_no_numbers_stay(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    given = {"model_init_kwargs": {"revision": "1234e56", "dtype": "auto"}, "column_map": {"prompt": "1e5"}}
    path.write_text(yaml.safe_dump({**BASE, **given}))
    config = resolve(path)
    assert {key: config[key] for key in given} == given
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--column_map", "prompt=question,chosen=good"]
    assert resolve(None, flags)["column_map"] == {"prompt": "question", "chosen": "good"}


def test_from_python() -> None:
    with pytest.raises(UserErrors, match="did you mean 'min_lr_rate'"):
        ORPOConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_ratio": 0.1}, use_cpu=True)
    with pytest.raises(UserErrors, match="expected: a mapping"):
        ORPOConfig(lr_scheduler_kwargs="min_lr=1e-6", use_cpu=True)
    config = ORPOConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 1e-6}', use_cpu=True)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize("metric", [*EVALUATED, *(f"eval_{name}" for name in EVALUATED)])
def test_every_metric_of_an_evaluation_can_choose_the_best(metric: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": metric}
    path.write_text(yaml.safe_dump({**BASE, **best}))
    assert resolve(path).training_args().metric_for_best_model == metric


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("accuracy", "rewards/accuracies"), ("eval_margin", "rewards/margins"), ("reward/chosen", "rewards/chosen"), ("nll", "nll_loss")],
)
def test_a_metric_that_no_evaluation_reports(metric: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "metric_for_best_model": metric}))
    with pytest.raises(UserErrors, match=f"did you mean '{meant}'"):
        resolve(path)


def test_the_metrics_named_are_those_of_an_evaluation(tmp_path: Path, tiny_model_factory, tiny_tokenizer_factory) -> None:
    from orpo import ORPOTrainer

    rows = [{"prompt": f"Q{n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(4)]
    tokenizer = tiny_tokenizer_factory()
    args = ORPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", bf16=False, per_device_train_batch_size=2)
    model = tiny_model_factory("llama", vocab_size=len(tokenizer))
    trainer = ORPOTrainer(model=model, args=args, train_dataset=rows[:2], eval_dataset=rows[2:], processing_class=tokenizer)
    reported = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert set(EVALUATED) <= reported
    assert reported - set(EVALUATED) <= {"runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time"}


@pytest.mark.parametrize(
    ("metric", "sets", "meant"),
    [
        ("accuracy", None, "rewards/accuracies"),
        ("loss", None, None),
        ("eval_hard_loss", ["easy", "hard"], None),
        ("hrad_loss", ["hard"], "hard_loss"),
    ],
)
def test_the_metric_is_looked_at_when_the_trainer_is_made(
    metric: str, sets: list[str] | None, meant: str | None, tmp_path: Path, tiny_model_factory, tiny_tokenizer_factory
) -> None:
    from orpo import ORPOTrainer

    rows = [{"prompt": f"Q{n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(4)]
    tokenizer = tiny_tokenizer_factory()
    model = tiny_model_factory("llama", vocab_size=len(tokenizer))
    args = ORPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", bf16=False, metric_for_best_model=metric)
    args.per_device_train_batch_size = 2
    held_out = rows[2:] if sets is None else dict.fromkeys(sets, rows[2:])
    given = {"model": model, "args": args, "train_dataset": rows[:2], "processing_class": tokenizer}
    if meant is None:
        ORPOTrainer(**given, eval_dataset=held_out)
        return
    with pytest.raises(UserError, match="metric_for_best_model") as caught:
        ORPOTrainer(**given, eval_dataset=held_out)
    assert caught.value.mend == f"did you mean {meant!r}?"

    class Own(ORPOTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), f"eval_{metric}": 1.0}

    Own(**given, eval_dataset=held_out)


def test_the_best_by_loss_where_no_metric_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "save_strategy": "best"}))
    args = resolve(path).training_args()
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    path.write_text(yaml.safe_dump({**BASE, "save_strategy": "best", "eval_strategy": "no"}))
    with pytest.raises(UserErrors, match="nothing is evaluated on the way"):
        resolve(path)
