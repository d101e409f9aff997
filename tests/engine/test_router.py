"""The router's auxiliary loss of mixtures of experts: against transformers' own function, in both engines, however a step is cut."""

from __future__ import annotations

import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo.data.types import TokenGroup
from orpo.engine import attention, padded, shared
from orpo.engine.choose import attention_implementation, choose
from orpo.engine.layout import PreferenceBatch, StepResult, collate
from orpo.engine.router import Router, router_of
from orpo.errors import UserError
from orpo.objective import ORPO
from orpo.training.steps import without_weight
from randomgroups import random_groups
from tinymodels import MIXTURES, build_tiny_model
from trainerruns import assert_same_trajectory, logged, make_trainer, weights

OBJECTIVE, COEF = ORPO(0.7), 0.5
GROUPS = random_groups(5, kinds=("pair", "four", "sft"), prompt=(3, 14), answer=(2, 12))


def build(name: str, **options: Any) -> Any:
    return build_tiny_model(name, num_layers=2, **options)


def run(engine: str, model: Any, batch: PreferenceBatch, router: Router | None) -> tuple[StepResult, dict[str, Tensor]]:
    """A micro-batch and its gradients."""
    model.zero_grad()
    if engine == "padded":
        result = padded.step(model, batch, OBJECTIVE, router=router)
    else:
        attention.register()
        with attention_implementation(model, attention.NAME):
            result = shared.step(model, batch, OBJECTIVE, router=router)
    result.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return result, gradients


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6 * largest, name


def own_loss(model: Any, group: TokenGroup) -> Tensor:
    """Transformers' own function for one group: every answer with its prompt, of which only the first copy is counted."""
    function = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    length = group.longest_tokens
    ids, counted, seen = (torch.zeros(len(group.response_ids), length, dtype=torch.long) for _ in range(3))
    for row, answer in enumerate(group.response_ids):
        whole = torch.tensor([*group.prompt_ids, *answer])
        ids[row, : len(whole)] = whole
        seen[row, : len(whole)] = 1
        counted[row, len(group.prompt_ids) if row else 0 : len(whole)] = 1
    output = model(input_ids=ids, attention_mask=seen, output_router_logits=True, use_cache=False)
    return function(output.router_logits, output.router_logits[0].shape[-1], model.num_experts_per_tok, counted)


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_routers_that_a_model_keeps_to_itself_are_missed_only_where_a_loss_is_asked_for(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GraniteMoE's class does under transformers 5.17."""
    model = build("qwen3_moe")
    expected, _ = run(engine, model, collate(GROUPS), None)
    forward = type(model).forward

    def silent(self: Any, *args: Any, output_router_logits: bool = False, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", silent)
    assert router_of(model, COEF) == Router(COEF, 2)
    result, _ = run(engine, model, collate(GROUPS), Router(0.0, 2))
    assert result.router is None
    assert result.loss == expected.loss
    with pytest.raises(UserError, match="router_aux_loss_coef: 0"):
        run(engine, model, collate(GROUPS), Router(COEF, 2))


@pytest.mark.parametrize("engine", ["shared", "padded"])
@pytest.mark.parametrize("architecture", list(MIXTURES))
def test_each_groups_loss_is_transformers_own(architecture: str, engine: str) -> None:
    """The mean by tokens of what transformers' function says of each group; its gradients too."""
    model = build(architecture)
    with torch.no_grad():
        if model(input_ids=torch.ones(1, 3, dtype=torch.long), output_router_logits=True).router_logits is None:
            pytest.skip("this version's class gives no logits of its routers")
    router = router_of(model, COEF)
    assert router == Router(COEF, 2)
    result, gradients = run(engine, model, collate(GROUPS), router)
    plain, plain_gradients = run(engine, model, collate(GROUPS), None)
    model.zero_grad()
    expected = sum(group.num_tokens * own_loss(model, group) for group in GROUPS) / sum(group.num_tokens for group in GROUPS)
    expected.backward()
    assert plain.router is None
    assert result.router.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert result.loss.item() == pytest.approx(plain.loss.item() + COEF * expected.item(), rel=1e-5)
    added = {
        name: plain_gradients[name] + (0 if parameter.grad is None else COEF * parameter.grad)
        for name, parameter in model.named_parameters()
        if name in plain_gradients
    }
    assert_close(gradients, added)
    assert result.router.load_YE.sum(1).tolist() == [2.0 * sum(group.num_tokens for group in GROUPS)] * len(result.router.load_YE)


def test_the_cut_into_micro_batches_changes_nothing() -> None:
    """One, two or five micro-batches, and a filler of weight zero among them."""
    model = build("mixtral")
    router = Router(COEF, 2)
    whole = collate(GROUPS)
    index = whole.index
    expected, gradients = run("shared", model, whole, router)
    for cut in ([0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]):
        parts = [collate(GROUPS[start:end]) for start, end in itertools.pairwise(cut)] + [without_weight(collate(GROUPS[:1]))]
        loss, total = 0.0, {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
        load = torch.zeros_like(expected.router.load_YE)
        for part in parts:
            result, found = run("shared", model, part.with_normalisers(index.num_nll_tokens, index.num_pairs, whole.num_tokens), router)
            loss += result.loss.item()
            load += result.router.load_YE
            total = {name: total[name] + gradient for name, gradient in found.items()}
        assert loss == pytest.approx(expected.loss.item(), rel=1e-5), cut
        assert torch.equal(load, expected.router.load_YE)
        assert_close(total, gradients)


# --- what is asked for -------------------------------------------------------------------------------------------------------------------


def test_it_is_added_where_the_configuration_asks_and_told_once_where_not(caplog: pytest.LogCaptureFixture) -> None:
    asking = build("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.02)
    assert router_of(asking) == Router(0.02, 2)
    assert router_of(asking, 0) == Router(0.0, 2)
    assert router_of(build("llama")) is None
    assert not caplog.records
    silent = build("qwen3_moe")
    engine = choose(silent, GROUPS, OBJECTIVE)
    assert engine.router == Router(0.0, 2)
    assert engine.name == "shared"
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "router_aux_loss_coef: 0.001 adds it" in told[0]
    caplog.clear()
    assert router_of(silent, 0) == Router(0.0, 2)
    assert not caplog.records
    with pytest.raises(UserError, match="no auxiliary loss of a router"):
        choose(build("llama"), GROUPS, OBJECTIVE, router_coef=0.01)


@pytest.mark.parametrize("engine", ["shared", "padded"])
def test_a_run_adds_and_logs_it_and_shows_the_load(engine: str, tmp_path: Path) -> None:
    """The same trajectory whatever the micro-batches; without the coefficient another one."""
    runs = {}
    for name, options in {
        "one": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "four": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "off": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "router_aux_loss_coef": 0.0},
    }.items():
        model = build("olmoe", output_router_logits=True, router_aux_loss_coef=0.3)
        trainer = make_trainer(tmp_path / name, GROUPS * 4, model=model, engine=engine, max_steps=5, **options)
        trainer.train()
        runs[name] = trainer
    assert_same_trajectory(logged(runs["one"]), logged(runs["four"]))
    assert logged(runs["one"], "aux_loss") == pytest.approx(logged(runs["four"], "aux_loss"), rel=1e-5)
    assert logged(runs["one"])[0] == pytest.approx(logged(runs["off"])[0] + 0.3 * logged(runs["off"], "aux_loss")[0], rel=1e-5)
    assert logged(runs["one"], "aux_loss")[-1] < logged(runs["off"], "aux_loss")[-1]
    for entry in runs["one"].state.log_history[:5]:
        assert entry["experts/busiest"] >= 1 >= entry["experts/idlest"] >= 0 <= entry["experts/unused"] < 1


def test_the_evaluations_loss_has_it_too(tmp_path: Path) -> None:
    losses = {}
    for coef in (0.0, 0.3):
        model = build("olmoe")
        trainer = make_trainer(tmp_path / str(coef), GROUPS, model=model, router_aux_loss_coef=coef, arguments={"eval_dataset": GROUPS})
        losses[coef] = trainer.evaluate()["eval_loss"]
        result = trainer.engine.step(trainer.model, collate(GROUPS), trainer.training_objective)
    assert losses[0.3] == pytest.approx(losses[0.0] + 0.3 * result.router.loss.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_an_adapter_on_the_experts_gets_the_same_gradients_from_both_engines(architecture: str) -> None:
    peft = pytest.importorskip("peft")
    model = build(architecture, router_aux_loss_coef=COEF, output_router_logits=True)
    names = [name for name, _ in model.named_parameters() if "experts" in name and name.endswith("_proj")]
    targets = sorted({".".join(name.split(".")[-3:]) for name in names})
    assert targets
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("experts" in name for name in trained)
    engine = choose(adapted, GROUPS, OBJECTIVE, requested="shared")
    assert engine.router == Router(COEF, 2)
    batch, found = collate(GROUPS), {}
    for name, step in (("shared", engine.step), ("padded", lambda *given: padded.step(*given, router=engine.router))):
        adapted.zero_grad()
        with attention_implementation(shared.unwrap(adapted), attention.NAME if name == "shared" else "sdpa"):
            step(adapted, batch, OBJECTIVE).loss.backward()
        found[name] = {key: parameter.grad.clone() for key, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert set(found["shared"]) == trained
    assert_close(found["shared"], found["padded"])


def test_checkpointed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    """The logits of a router leave the layer beside its output; recomputation must reach them."""
    found = []
    for checkpointing in (False, True):
        model = build("mixtral", router_aux_loss_coef=COEF, output_router_logits=True)
        trainer = make_trainer(tmp_path / str(checkpointing), GROUPS, model=model, max_steps=3, gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(weights(trainer.model))
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-6), name


def test_reentrant_checkpointing_which_would_lose_its_gradient_is_refused(tmp_path: Path) -> None:
    model = build("mixtral", router_aux_loss_coef=COEF, output_router_logits=True)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(tmp_path, GROUPS, model=model, max_steps=1, **options)
    with pytest.raises(UserError, match="loses the gradient of the router"):
        trainer.train()
