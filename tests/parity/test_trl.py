"""Parity with TRL 1.16's ORPOTrainer on the ids that TRL itself tokenised: loss, every gradient, every metric, and five steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from orpo.data.types import TokenGroup
from orpo.engine import attention, padded, shared
from orpo.engine.choose import attention_implementation
from orpo.engine.layout import collate
from orpo.engine.router import balance, router_of
from orpo.objective import METRICS, ORPO
from orpo.training.metrics import means
from randomgroups import group
from tinymodels import build_tiny_model, build_tiny_tokenizer
from trainerruns import QUIET, make_trainer, weights

pytestmark = pytest.mark.parity

BATCH, LAMBDA = 4, 0.7
TRL_NAMES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("nll_loss", "log_odds_ratio", "log_odds_chosen"),
)
ROWS = [
    ("What is the weather like today?", "It is sunny, and the wind is light.", "No."),
    ("Please tell me how to reset the password.", "Open the settings.", "I would rather not say, but thank you for asking."),
    ("Yes or no?", "The answer is yes.", "The answer is no."),
    ("Tell me a short story about the sea, please, with a boat and a storm.", "The boat left the harbour.", "It is sunny."),
]


def trl_trainer(folder: Path, architecture: str = "llama", **overrides: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.experimental.orpo")
    rows = [{"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"} for prompt, chosen, rejected in ROWS * 5]
    for number, row in enumerate(rows):  # no two steps alike
        row["chosen"] += f" {number}"
    args = trl.ORPOConfig(
        output_dir=str(folder), bf16=False, beta=LAMBDA, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, max_steps=5,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, logging_steps=1, gradient_checkpointing=False, **QUIET,
    )  # fmt: skip
    model = build_tiny_model(architecture, vocab_size=384, **overrides)
    # TRL closes an answer with eos, which here is the template's end of turn; rows are plain text.
    return trl.ORPOTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=build_tiny_tokenizer(chat_template=None)
    )


def groups_of(trainer: Any) -> list[TokenGroup]:
    """TRL's tokenised rows as token groups; its labels say where the answer begins."""
    groups = []
    for row in trainer.train_dataset:
        starts = {side: sum(label == -100 for label in row[f"{side}_labels"]) for side in ("chosen", "rejected")}
        prompts = {tuple(row[f"{side}_input_ids"][:start]) for side, start in starts.items()}
        assert len(prompts) == 1
        groups.append(group(prompts.pop(), *(row[f"{side}_input_ids"][start:] for side, start in starts.items())))
    return groups


@pytest.mark.parametrize("engine", ["shared", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_loss_gradients_and_metrics_equal_trls(engine: str, architecture: str, tmp_path: Path) -> None:
    peer = trl_trainer(tmp_path, architecture)
    groups = groups_of(peer)[:BATCH]
    rows = peer.data_collator([peer.train_dataset[index] for index in range(BATCH)])
    model = peer.model.train()
    expected, expected_metrics = peer.get_batch_loss_metrics(model, rows)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    batch, objective = collate(groups), ORPO(LAMBDA)
    attention.register()
    if engine == "shared":
        with attention_implementation(model, attention.NAME):
            result = shared.step(model, batch, objective)
            result.loss.backward()
    else:
        result = padded.step(model, batch, objective)
        result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found_metrics = means(dict(zip(METRICS, result.sums.tolist(), strict=True)), reward_scale=LAMBDA)
    assert {name: found_metrics[name] for name in TRL_NAMES} == pytest.approx(
        {name: expected_metrics[name] for name in TRL_NAMES}, rel=1e-5, abs=1e-6
    )
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_five_steps_equal_trls(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order: losses, learning rates, gradient norms, metrics and final weights."""
    peer = trl_trainer(tmp_path / "trl")
    groups = groups_of(peer)
    start = weights(peer.model)
    monkeypatch.setattr(type(peer), "_get_train_sampler", lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset))
    own = make_trainer(
        tmp_path / "own", groups, model=build_tiny_model("llama", vocab_size=384), engine=engine, orpo_alpha=LAMBDA, max_steps=5,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
    )  # fmt: skip
    make_sampler = own._sampler

    def in_the_order_of_the_data(rows: Any, *, is_training: bool) -> Any:
        sampler = make_sampler(rows, is_training=is_training)
        sampler.seed = None
        return sampler

    monkeypatch.setattr(
        own, "_sampler", in_the_order_of_the_data
    )  # train() makes a sampler of its own, from the arguments as they are then
    peer.train()
    own.train()
    found, expected = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (own, peer))
    assert len(found) == len(expected) == 5
    for entry, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", *TRL_NAMES):
            assert entry[name] == pytest.approx(other[name], rel=2e-5, abs=2e-6), name
    for (name, weight), other in zip(own.model.named_parameters(), peer.model.parameters(), strict=True):
        moved = (other - start[name]).norm()
        assert moved > 0
        # AdamW divides by a gradient's own size, so that rounding of a tiny one moves its weight by as much as a large one's.
        assert (weight - other).norm() <= 1e-3 * moved, name


def test_what_trl_logs_is_what_we_log(tmp_path: Path) -> None:
    """All of TRL's names but the mean logits, which no user can interpret and which would need the logits of every position."""
    peer = trl_trainer(tmp_path)
    _, metrics = peer.get_batch_loss_metrics(peer.model, peer.data_collator([peer.train_dataset[0]]))
    assert set(metrics) - {"logits/chosen", "logits/rejected"} == set(TRL_NAMES)


def test_a_routers_loss_at_one_pair_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts a prompt once for each answer. Without the second copy its loss is ours; ours of its rows, copies and all, is its."""
    peer = trl_trainer(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    pair, model = groups_of(peer)[0], peer.model.eval()
    rows = peer.data_collator([peer.train_dataset[0]])
    family = sys.modules[type(model).__module__]
    original, seen = family.load_balancing_loss_func, []

    def with_the_prompt_once(logits: Any, experts: int, top_k: int, mask: torch.Tensor) -> Any:
        seen.append((logits, mask))
        once = mask.clone()
        once[1, : len(pair.prompt_ids)] = 0
        return original(logits, experts, top_k, once)

    monkeypatch.setattr(family, "load_balancing_loss_func", with_the_prompt_once)
    expected, _ = peer.get_batch_loss_metrics(model, rows)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    monkeypatch.undo()

    logits, mask = seen[0]
    copies = [layer.detach()[mask.reshape(-1).bool()] for layer in logits]
    unshared = balance(copies, [len(copies[0])], 2, 1 / len(copies[0])).loss
    assert unshared.item() == pytest.approx(original(logits, 4, 2, mask).item(), rel=1e-6)

    engines = {"padded": padded.step, "shared": shared.step}
    attention.register()
    for name, step in engines.items():
        model.zero_grad()
        with attention_implementation(model, attention.NAME if name == "shared" else "sdpa"):
            result = step(model, collate([pair]), ORPO(LAMBDA), router=router_of(model))
            result.loss.backward()
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        largest = max(gradient.norm() for gradient in gradients.values())
        for key, parameter in model.named_parameters():
            assert (parameter.grad - gradients[key]).norm() <= 1e-5 * gradients[key].norm() + 1e-7 * largest, key
