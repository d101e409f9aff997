"""`torch_compile: true`: one graph for each kind of layer, attention included, the same losses; what cannot be compiled is said."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcpu import varlen_runs_here
from flexcpu import flex_as_on_a_gpu
from orpo.engine import attention, kernels, shared
from orpo.engine.choose import attention_implementation
from orpo.engine.compiled import compiled_layers
from orpo.engine.layout import collate
from orpo.errors import UserError
from orpo.objective import ORPO
from randomgroups import random_groups
from tinymodels import ARCHITECTURES, build_tiny_model
from trainerruns import logged, make_trainer, weights

GROUPS = random_groups(12, kinds=("pair", "four"))
EAGER: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
KINDS = {"gemma3": 2, "gemma2": 2, "gpt_oss": 2, "cohere2": 2}
"""Kinds of layers where there are several: with a window and without."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model: Any, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    result = shared.step(model, collate(random_groups(3, seed=seed, kinds=("pair", "four"))), ORPO())
    result.loss.backward()
    return result.loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


ALWAYS = ("llama",)
RARELY = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in (*ALWAYS, "mamba")]


@pytest.mark.parametrize("architecture", [*ALWAYS, *RARELY])
def test_a_layer_is_one_graph_for_all_lengths(architecture: str) -> None:
    """No break, one graph for each kind of layer however many layers and micro-batches there are, and gradients to the bit."""
    model = build_tiny_model(architecture, num_layers=3).train()
    attention.register()
    with attention_implementation(model, attention.NAME):
        for seed in range(3):
            loss, expected = gradients(model, seed)
            with compiled_layers(model, backend="aot_eager") as count:
                found_loss, found = gradients(model, seed)
            assert count == 3
            assert found_loss == loss
            for name, gradient in expected.items():
                assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == KINDS.get(architecture, 1)
    assert all("forward" not in vars(module) for module in model.modules())


HERE = {"flex": flex_as_on_a_gpu, "varlen": varlen_runs_here}
"""Kernels that a CPU does not have, by their own arithmetic."""
SELDOM = [(kernel, name) for kernel in HERE for name in ("mistral", "gemma3", "qwen3", "qwen3_moe")]
SELDOM += [("flex", "gemma2"), ("flex", "gpt_oss"), ("varlen", "llama")]


@pytest.mark.parametrize(
    ("kernel", "architecture"),
    [("flex", "llama"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)],
)
def test_a_compiled_layer_has_any_kernel_in_it(kernel: str, architecture: str) -> None:
    """No break, nothing compiled anew for another length (one block of rows, or several), and gradients as without."""
    model = build_tiny_model(architecture, num_layers=3 if KINDS.get(architecture, 1) > 1 else 2).train()
    attention.register()
    counts = []
    with HERE[kernel](), attention_implementation(model, attention.NAME):
        for prompt in (10, 150):
            batch = collate(random_groups(3, seed=prompt, kinds=("pair", "four"), prompt=(prompt, prompt + 20), answer=(2, 20)))
            found = []
            for compiled in (nullcontext(), compiled_layers(model, backend="aot_eager")):
                with compiled:
                    result = shared.step(model, batch, ORPO(), kernel=kernel)
                    found.append([result.logp_N, *torch.autograd.grad(result.loss, list(model.parameters()), allow_unused=True)])
            counts.append(kernels.num_compiled_graphs())
            for left, right in zip(*found, strict=True):
                assert (left is None) == (right is None)
                assert left is None or torch.allclose(left, right, rtol=1e-5, atol=1e-6 * float(left.abs().max()))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(counts)) == 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("kernel", HERE)
def test_a_run_with_compiled_layers_keeps_its_kernel(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own graphs are made in the first steps."""
    monkeypatch.setitem(kernels.KERNELS, kernel, dataclasses.replace(kernels.KERNELS[kernel], trains_on=None, dtypes=None))
    runs = []
    with HERE[kernel]():
        for compiling in ({}, EAGER):
            trainer = make_trainer(tmp_path / str(len(runs)), GROUPS, max_steps=6, attention_kernel=kernel, **compiling)
            trainer.train()
            runs.append(trainer)
    assert runs[1].compiled == "yes"
    assert runs[1].how_computed["attention_kernel"] == kernel
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=1e-5)
    assert runs[1].graphs.num_late == 0


@pytest.mark.parametrize(("architecture", "told"), [("gemma2", "soft cap"), ("gpt_oss", "sinks")])
def test_what_a_kernel_cannot_do_it_cannot_do_compiled(
    architecture: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="'varlen' trains on cuda alone"):
        make_trainer(tmp_path, GROUPS, attention_kernel="varlen", **EAGER)
    monkeypatch.setitem(kernels.KERNELS, "varlen", dataclasses.replace(kernels.KERNELS["varlen"], trains_on=None, dtypes=None))
    trainer = make_trainer(tmp_path, GROUPS, model=build_tiny_model(architecture), attention_kernel="varlen", **EAGER)
    with pytest.raises(UserError, match=told):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": "auto", "memory_budget_gib": 0.01}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"bf16": False, "fp16": True}, marks=pytest.mark.slow),
        pytest.param({"engine": "padded"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_with_compiled_layers_has_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
    """An evaluation in the middle included."""
    runs = []
    for compiling in ({}, EAGER):
        arguments = {"eval_dataset": GROUPS[:4]}
        folder = tmp_path / str(len(runs))
        trainer = make_trainer(
            folder, GROUPS, max_steps=4, eval_strategy="steps", eval_steps=2, arguments=arguments, **options, **compiling
        )
        trainer.train()
        runs.append(trainer)
    assert runs[1].compiled == "yes"
    tolerance = {"rel": 1e-5} if options.get("bf16") is None and not options.get("fp16") else {"rel": 2e-2}
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), **tolerance)
    assert logged(runs[1], "eval_loss") == pytest.approx(logged(runs[0], "eval_loss"), **tolerance)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert runs[1].args.torch_compile is True
    assert set(weights(runs[0].model)) == set(weights(runs[1].model))  # as they were named


def test_a_layer_that_is_no_single_graph_is_left_as_it_is_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny_model("llama", num_layers=2)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def looks_at_values(x: torch.Tensor) -> torch.Tensor:
        return forward(x) if float(x.sum()) > -1e30 else x

    mlp.forward = looks_at_values
    trainer = make_trainer(tmp_path, GROUPS, model=model, max_steps=2, **EAGER)
    trainer.train()
    assert trainer.compiled.startswith("no: ")
    told = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert len(told) == 1
    assert len(logged(trainer)) == 2
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_gradients() -> None:
    model = build_tiny_model("llama", num_layers=2).train()
    attention.register()
    with attention_implementation(model, attention.NAME):
        for seed in range(2):
            loss, expected = gradients(model, seed)
            with compiled_layers(model):
                found_loss, found = gradients(model, seed)
            assert found_loss == pytest.approx(loss, rel=1e-5)
            for name, gradient in expected.items():
                assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
