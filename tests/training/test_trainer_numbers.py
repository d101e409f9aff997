"""The trainer's numbers against values computed here: gradients, clipping, logged means, evaluation, steps and epochs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from orpo import ORPOTrainer
from orpo.data.types import TokenGroup
from orpo.engine import padded
from orpo.engine.layout import collate
from orpo.errors import GuardStop
from orpo.objective import METRICS, ORPO, evaluate
from orpo.training.metrics import means
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import logged, make_trainer, weights

CUTS = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    return random_groups(11, kinds=("pair", "pair", "four", "sft"), prompt=(2, 14), answer=(1, 10))


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, as the optimizer is about to use them, and its learning rate."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.gradients:
            self.gradients = {name: parameter.grad.detach().float().clone() for name, parameter in model.named_parameters()}


def dense_gradients(groups: list[TokenGroup], alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """All rows at once, padded, autograd from end to end."""
    model = build_tiny_model("llama", num_layers=2).train()
    batch = collate(groups)
    logp_N = padded.token_logps(model, batch)
    torch.stack(list(ORPO(alpha)(logp_N, batch.index).values())).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradients_of_a_step_clipped_as_torch_clips(
    cut: str, max_grad_norm: float, bf16: bool, tmp_path: Path, groups: list[TokenGroup]
) -> None:
    rows, steps = CUTS[cut]
    watch = Watch()
    trainer = make_trainer(
        tmp_path, groups[:8], per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=1, bf16=bf16,
        max_grad_norm=max_grad_norm, arguments={"callbacks": [watch]},
    )  # fmt: skip
    trainer.train()
    expected = dense_gradients(groups[:8])
    norm = torch.nn.utils.get_total_norm(list(expected.values()))
    assert logged(trainer, "grad_norm") == [pytest.approx(norm.item(), rel=1e-2 if bf16 else 1e-5)]
    scale = getattr(getattr(trainer.optimizer, "optimizer", trainer.optimizer), "gradient_scale", None)
    if scale is not None:  # AdamW on masters clips in the step itself; test_precision proves that
        return
    if max_grad_norm:
        expected_leaves = [torch.zeros_like(gradient).requires_grad_() for gradient in expected.values()]
        for leaf, gradient in zip(expected_leaves, expected.values(), strict=True):
            leaf.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(expected_leaves, max_grad_norm)
        expected = {name: leaf.grad for name, leaf in zip(expected, expected_leaves, strict=True)}  # type: ignore[misc]
    for name, gradient in expected.items():
        assert (watch.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("bf16", [False, True])
def test_clipping_reaches_the_weights(bf16: bool, tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Plain descent: the step's length is the rate times the norm, or the clip where that is smaller. AdamW would hide a scale."""
    moved = {}
    for clip in (0.0, 0.1):
        model = build_tiny_model("llama", num_layers=2)
        start = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        arguments = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))}
        trainer = make_trainer(tmp_path / str(clip), groups, model=model, max_steps=1, max_grad_norm=clip, bf16=bf16, arguments=arguments)
        trainer.train()
        moved[clip] = math.sqrt(sum((weight - start[name]).square().sum().item() for name, weight in weights(model).items()))
    norm = logged(trainer, "grad_norm")[0]
    assert norm > 0.1
    assert moved[0.0] == pytest.approx(1e-2 * norm, rel=1e-2)
    assert moved[0.1] == pytest.approx(1e-2 * 0.1, rel=1e-2)


def test_master_adamw_clips_too(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Two steps of AdamW in which the second gradient is clipped and the first is not differ from two unclipped ones."""
    runs = {}
    for name, options in {
        "float32": {"bf16": False, "max_grad_norm": 0.1},
        "bf16": {"bf16": True, "max_grad_norm": 0.1},
        "unclipped": {"bf16": True, "max_grad_norm": 0.0},
    }.items():
        # An epsilon as large as the clipped gradients makes AdamW feel their scale.
        trainer = make_trainer(tmp_path / name, groups, max_steps=4, adam_epsilon=1e-2, learning_rate=1e-2, **options)
        trainer.train()
        runs[name] = torch.cat([weight.flatten() for weight in weights(trainer.model).values()])
    start = torch.cat([weight.flatten() for weight in weights(build_tiny_model("llama", num_layers=2)).values()])
    distance = (runs["bf16"] - runs["float32"]).norm() / (runs["float32"] - start).norm()
    assert distance < 0.1
    assert (runs["unclipped"] - runs["float32"]).norm() / (runs["float32"] - start).norm() > 0.5


# --- logs ------------------------------------------------------------------------------------------------------------------------------


def own_numbers(groups: list[TokenGroup], rows: list[int], alpha: float) -> tuple[float, dict[str, float]]:
    """(loss, metrics) of some rows with the start's weights, computed here."""
    batch = collate([groups[row] for row in rows])
    with torch.no_grad():
        logp_N = padded.token_logps(build_tiny_model("llama", num_layers=2), batch)
    found = evaluate(ORPO(alpha), logp_N, batch.index)
    return found.loss.item(), dict(zip(METRICS, found.sums.tolist(), strict=True))


@pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4)])
def test_logged_values_are_the_means_of_what_was_trained(cut: tuple[int, int], tmp_path: Path, groups: list[TokenGroup]) -> None:
    """At a rate too small to move anything: steps of 4, 4 and 3 rows, logged after two and after all."""
    trainer = make_trainer(
        tmp_path, groups, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], num_train_epochs=1, logging_steps=2,
        learning_rate=1e-15, orpo_alpha=0.3,
    )  # fmt: skip
    trainer.train()
    order = trainer.train_sampler.order()
    steps = [own_numbers(groups, order[start : start + 4], 0.3) for start in (0, 4, 8)]
    logs = [entry for entry in trainer.state.log_history if "nll_loss" in entry]
    assert [log["step"] for log in logs] == [2, 3], "every second step, and what is left at the end"
    for log, part in zip(logs, (steps[:2], steps[2:]), strict=True):
        expected = {name: sum(metrics[name] for _, metrics in part) for name in METRICS}
        assert log["loss"] == pytest.approx(sum(loss for loss, _ in part) / len(part), rel=1e-5)
        for name, value in means(expected, reward_scale=0.3).items():
            assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    summary = trainer.state.log_history[-1]
    assert summary["train_loss"] == pytest.approx(sum(loss for loss, _ in steps) / 3, rel=1e-5)


@pytest.mark.parametrize(("options", "steps"), [({}, [3]), ({"logging_steps": 2}, [2, 3]), ({"logging_strategy": "no"}, [])])
def test_a_run_shorter_than_its_logging_steps_logs_at_its_end(
    options: dict[str, Any], steps: list[int], tmp_path: Path, groups: list[TokenGroup]
) -> None:
    trainer = make_trainer(tmp_path, groups, **{"max_steps": 3, "logging_steps": 10, **options})
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "nll_loss" in log] == steps


def test_the_ends_of_chosen_answers_are_logged(tmp_path: Path) -> None:
    """Mean log-probability of the last token of every answer that wins something and came to its end; not of cut or losing ones."""
    four, pair, alone = random_groups(3, kinds=("four", "pair", "sft"), prompt=(3, 9), answer=(2, 8))
    cut = replace(pair, is_ended=(False, True))
    rows = [four, pair, cut, alone]
    trainer = make_trainer(tmp_path, rows, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    trainer.train()
    batch = collate(rows)
    with torch.no_grad():
        logp_N = padded.token_logps(build_tiny_model("llama", num_layers=2), batch)
    # By hand: of the four answers the first three win (once as "chosen" of six pairs), of the pair the first.
    lasts = [int((batch.index.response_N == response).nonzero().max()) for response in (0, 1, 2, 4)]
    assert logged(trainer, "logps/end") == [pytest.approx(logp_N[lasts].mean().item(), rel=1e-5)]


def test_metrics_are_written_as_they_are_logged(tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = make_trainer(tmp_path, groups, max_steps=3)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == logged(trainer)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert {"tokens_per_second", "pairs_per_second", "grad_norm", "learning_rate", "epoch"} <= lines[0].keys()


# --- evaluation ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_evaluation_is_one_mean_over_all_rows(batch_size: int, engine: str, tmp_path: Path, groups: list[TokenGroup]) -> None:
    held_out = random_groups(7, seed=9, kinds=("pair", "four", "sft"))
    trainer = make_trainer(
        tmp_path, groups, arguments={"eval_dataset": held_out}, per_device_eval_batch_size=batch_size, engine=engine, orpo_alpha=0.3
    )
    found = trainer.evaluate()
    assert trainer.engine.name == engine
    loss, metrics = own_numbers(held_out, list(range(7)), 0.3)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    expected = means(metrics, reward_scale=0.3)
    del expected["grad_share/odds_ratio"]
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("piece", [1, 2])
def test_evaluation_in_pieces_is_the_same(piece: int, tmp_path: Path, groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = random_groups(7, seed=9, kinds=("pair", "four", "sft"))
    trainer = make_trainer(tmp_path, groups, arguments={"eval_dataset": held_out}, per_device_eval_batch_size=2)
    expected = trainer.evaluate()
    monkeypatch.setattr("orpo.training.loaders.EVALUATION_PIECE", piece)
    assert len(trainer.get_eval_dataloader()) == -(-7 // (2 * piece))
    found = trainer.evaluate()
    assert {name: found[name] for name in expected if "second" not in name and "time" not in name} == pytest.approx(
        {name: value for name, value in expected.items() if "second" not in name and "time" not in name}, rel=1e-5
    )


def test_evaluation_leaves_no_trace_in_the_training(tmp_path: Path, groups: list[TokenGroup]) -> None:
    runs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path / strategy, groups, arguments={"eval_dataset": groups[:3]}, eval_strategy=strategy, eval_steps=1, max_steps=4,
            logging_steps=2, bf16=True,
        )  # fmt: skip
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "nll_loss" in entry]
        runs.append([{key: value for key, value in entry.items() if "second" not in key} for entry in entries])
    assert runs[0] == runs[1]


def test_a_dict_of_evaluation_sets(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """TRL's fails on one (trl#6230)."""
    sets = {"near": random_groups(3, seed=1), "far": random_groups(2, seed=2)}
    trainer = make_trainer(tmp_path, groups, arguments={"eval_dataset": sets}, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    found = trainer.evaluate()
    for name, rows in sets.items():
        assert f"eval_{name}_rewards/accuracies" in found
        assert trainer.evaluate(eval_dataset=rows)["eval_loss"] == pytest.approx(found[f"eval_{name}_loss"], rel=1e-6)
    assert any("eval_near_loss" in entry for entry in trainer.state.log_history)


def test_other_rows_can_be_evaluated_and_predicted(tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = make_trainer(tmp_path, groups)
    other = random_groups(3, seed=4)
    found = trainer.evaluate(other, metric_key_prefix="test")
    assert found["test_loss"] == pytest.approx(own_numbers(other, [0, 1, 2], 1.0)[0], rel=1e-5)
    assert trainer.predict(other).metrics["test_loss"] == pytest.approx(found["test_loss"])


def test_nothing_to_evaluate_on_is_said(tmp_path: Path, groups: list[TokenGroup]) -> None:
    from orpo.errors import UserError

    with pytest.raises(UserError, match="no rows to evaluate"):
        make_trainer(tmp_path, groups).evaluate()


def test_training_mode_is_restored_after_evaluation(tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = make_trainer(tmp_path, groups, arguments={"eval_dataset": groups[:2]})
    for is_training in (True, False):
        trainer.model.train(is_training)
        trainer.evaluate()
        assert trainer.model.training is is_training


# --- steps and epochs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"num_train_epochs": 1}, 3, 1.0),
        ({"num_train_epochs": 2}, 6, 2.0),
        ({"num_train_epochs": 0.5}, 2, 2 / 3),
        ({"max_steps": 4}, 4, 4 / 3),
        ({"max_steps": 1}, 1, 1 / 3),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 100}, 1, 1.0),
    ],
    ids=str,
)
def test_steps_and_epochs(options: dict[str, Any], steps: int, epochs: float, tmp_path: Path, groups: list[TokenGroup]) -> None:
    """11 rows in steps of 4: two whole steps and one of three rows."""
    trainer = make_trainer(tmp_path, groups, **options)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert trainer.state.epoch == pytest.approx(epochs)


class Rows(TrainerCallback):
    """Which rows each step was made of."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def watch(self, trainer: ORPOTrainer) -> None:
        original = trainer.training_step

        def step(model: Any, inputs: Any, *rest: Any) -> Any:
            self.steps.append(sorted(item.where.row for item in inputs.groups))
            return original(model, inputs, *rest)

        trainer.training_step = step  # type: ignore[method-assign]


def numbered(groups: list[TokenGroup]) -> list[TokenGroup]:
    from orpo.data.types import Where

    return [replace(item, where=Where("rows.jsonl", number)) for number, item in enumerate(groups)]


def test_every_epoch_trains_every_row_once_in_an_order_of_its_own(tmp_path: Path, groups: list[TokenGroup]) -> None:
    rows = Rows()
    trainer = make_trainer(tmp_path, numbered(groups), num_train_epochs=3)
    rows.watch(trainer)
    trainer.train()
    epochs = [rows.steps[start : start + 3] for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == list(range(11))
        assert [len(step) for step in epoch] == [4, 4, 3]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("one", "other", "same"), [({}, {}, True), ({}, {"seed": 8}, False), ({}, {"data_seed": 8}, False)], ids=str)
def test_the_seed_decides_the_order(
    one: dict[str, int], other: dict[str, int], same: bool, tmp_path: Path, groups: list[TokenGroup]
) -> None:
    orders = []
    for number, options in enumerate((one, other)):
        rows = Rows()
        trainer = make_trainer(tmp_path / str(number), numbered(groups), max_steps=3, **options)
        rows.watch(trainer)
        trainer.train()
        orders.append(rows.steps)
    assert (orders[0] == orders[1]) is same


def test_the_order_does_not_depend_on_the_cut(tmp_path: Path, groups: list[TokenGroup]) -> None:
    found = []
    for number, cut in enumerate(((4, 1), (1, 4))):
        rows = Rows()
        trainer = make_trainer(
            tmp_path / str(number), numbered(groups), per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], max_steps=6
        )
        rows.watch(trainer)
        trainer.train()
        found.append(rows.steps)
    assert found[0] == found[1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_counts_optimizer_steps(schedule: str, tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Warm-up over a quarter of 8 steps, then down to nothing at the end, whatever the accumulation."""
    trainer = make_trainer(tmp_path, groups, max_steps=8, warmup_steps=0.25, lr_scheduler_type=schedule, learning_rate=1e-3)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    expected = [0.0, 0.5] + [(1 - step / 6) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([1e-3 * rate for rate in expected], abs=1e-9)


# --- guards ------------------------------------------------------------------------------------------------------------------------------


def poisoned(groups: list[TokenGroup], tmp_path: Path, **options: Any) -> ORPOTrainer:
    """From the second step on a weight is not a number."""

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                with torch.no_grad():
                    next(model.parameters())[5] = float("nan")

    return make_trainer(tmp_path, groups, arguments={"callbacks": [Poison()]}, max_steps=5, **options)


@pytest.mark.parametrize("bf16", [False, True])
def test_numbers_that_are_none_stop_before_the_optimizer_step(bf16: bool, tmp_path: Path, groups: list[TokenGroup]) -> None:
    """The other weights are those of the step before."""
    trainer = poisoned(groups, tmp_path, bf16=bf16)
    with pytest.raises(GuardStop, match="step 2"):
        trainer.train()
    finite = [bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters()]
    assert finite.count(False) == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_may_be_skipped_instead(bf16: bool, tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = poisoned(groups, tmp_path, bf16=bf16, on_nonfinite="skip", max_nonfinite_skips=10)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.nonfinite.num_skipped == 4
    assert [bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters()].count(False) == 1
