"""The same data gives the same thirty steps, however a step is cut, packed or padded, and equals a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo import ORPOTrainer
from orpo.data.types import TokenGroup
from orpo.engine import padded
from orpo.engine.layout import collate
from orpo.objective import ORPO
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import assert_same_trajectory, logged, make_trainer, weights

STEPS = 30


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    """67 rows in steps of 8: nine steps an epoch, the last of three rows; every kind of row."""
    return random_groups(67, kinds=("pair", "pair", "four", "sft", "partial"), prompt=(2, 16), answer=(1, 12))


def run(tmp_path: Path, groups: list[TokenGroup], **options: Any) -> ORPOTrainer:
    defaults = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": STEPS}
    trainer = make_trainer(tmp_path, groups, **{**defaults, **options})
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, groups: list[TokenGroup]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """8x1 through the padded engine."""
    trainer = run(tmp_path_factory.mktemp("reference"), groups, engine="padded")
    assert trainer.engine.name == "padded"
    assert logged(trainer)[-1] < 0.9 * logged(trainer)[0]  # something is learned: a standstill would agree with everything
    return logged(trainer), weights(trainer.model)


CUTS: dict[str, dict[str, Any]] = {
    "8x1": {},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "tokens": {"max_tokens_per_microbatch": 60},
    "tiny_budget": {"logits_budget_mb": 1},
}


@pytest.mark.parametrize(
    ("engine", "cut"), [*(("shared", cut) for cut in CUTS), *(("padded", cut) for cut in CUTS if cut not in ("8x1", "tiny_budget"))]
)
def test_thirty_steps_are_the_same_however_they_are_cut(
    engine: str, cut: str, tmp_path: Path, groups: list[TokenGroup], reference: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    trainer = run(tmp_path, groups, engine=engine, **CUTS[cut])
    assert trainer.engine.name == engine
    assert_same_trajectory(logged(trainer), reference[0])
    for name, weight in weights(trainer.model).items():
        assert (weight - reference[1][name]).norm() <= 1e-4 * reference[1][name].norm(), name


def test_the_trainer_equals_a_loop_written_by_hand(
    tmp_path: Path, groups: list[TokenGroup], reference: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    """No sampler, no engine choice, no Trainer: rows in the order that the run had, AdamW, torch's clipping, a linear schedule."""
    trainer = make_trainer(tmp_path, groups, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=STEPS)
    model = build_tiny_model("llama", num_layers=2).train()
    assert trainer.args.weight_decay == 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        epoch, place = divmod(step, 9)
        trainer.train_sampler.set_epoch(epoch)
        order = trainer.train_sampler.order()
        rows = [groups[row] for row in order[8 * place : 8 * place + 8]]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (STEPS - step) / STEPS
        batch = collate(rows)
        logp_N = padded.token_logps(model, batch)
        loss = torch.stack(list(ORPO(1.0)(logp_N, batch.index).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    assert_same_trajectory(reference[0], losses)
    for name, weight in weights(model).items():
        assert (weight - reference[1][name]).norm() <= 1e-4 * weight.norm(), name


def test_packing_gradients_and_checkpointing_together(
    tmp_path: Path, groups: list[TokenGroup], reference: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    trainer = run(
        tmp_path, groups, engine="shared", gradient_checkpointing=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert_same_trajectory(logged(trainer), reference[0])


@pytest.mark.parametrize("options", [{"nll_scope": "response"}, {"orpo_beta": 0.1}, {"weight_decay": 0.1, "max_grad_norm": 0.0}], ids=str)
def test_other_settings_agree_between_the_engines(options: dict[str, Any], tmp_path: Path, groups: list[TokenGroup]) -> None:
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 12}
    runs = [
        logged(run(tmp_path / "padded", groups, engine="padded", max_steps=12, **options)),
        logged(run(tmp_path / "shared", groups, engine="shared", **{**cut, **options})),
    ]
    assert_same_trajectory(runs[1], runs[0])


def test_adapters_agree_between_the_engines(tmp_path: Path, groups: list[TokenGroup]) -> None:
    from peft import LoraConfig

    def train(engine: str, **options: Any) -> list[float]:
        arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
        torch.manual_seed(0)  # of the adapter's random part
        return logged(run(tmp_path / engine, groups, engine=engine, arguments=arguments, learning_rate=1e-2, **options))

    expected = train("padded")
    assert expected[-1] < 0.95 * expected[0]
    assert_same_trajectory(train("shared", per_device_train_batch_size=2, gradient_accumulation_steps=4), expected)
