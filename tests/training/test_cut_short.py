"""A step that an exception cuts short: whoever goes on with the same trainer gets what he would have got without it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from faults.forked import Zygote
from orpo import ORPOTrainer
from orpo.errors import GuardStop
from orpo.training.steps import StepBatch, StepDataset, StepSampler
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import logged, make_trainer, weights

GROUPS = random_groups(16, kinds=("pair", "four", "sft"))
STEPS = 4
HALF: dict[str, Any] = {"bf16": None, "fp16": True}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": HALF, "padded": {"engine": "padded", "bf16": True}}


class At(TrainerCallback):
    """Calls something at a point of the second step of the first training."""

    def __init__(self, point: str, what: Callable[[], None]) -> None:
        self.point, self.what, self.is_over = point, what, False

    def _reached(self, point: str, state: Any) -> None:
        if point == self.point and state.global_step == 1 and not self.is_over:
            self.is_over = True
            self.what()

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._reached("step begins", state)

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._reached("before the optimizer", state)


def no_memory() -> None:
    raise torch.OutOfMemoryError("no memory for this row")


def interrupt() -> None:
    raise KeyboardInterrupt


def in_a_forward(trainer: ORPOTrainer) -> None:
    """Of the step's second micro-batch: the first one's gradients are there already."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            handle.remove()
            no_memory()

    handle = trainer.model.model.layers[0].register_forward_pre_hook(count)


def _at_gradient_of(module: torch.nn.Module, call: Callable[[Any, torch.Tensor], torch.Tensor | None]) -> None:
    """Call something with the gradient of what a module gives, at every backward pass until it removes the handle that it gets too.

    Not a hook of a weight: where weights are in parts it is another tensor that gets the gradient.
    """

    def watch(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: call(handle, gradient))

    handle = module.register_forward_hook(watch)


def in_a_backward(trainer: ORPOTrainer) -> None:
    """Of the step's second micro-batch, when some of its gradients are there."""
    calls = 0

    def count(handle: Any, _: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            handle.remove()
            no_memory()

    _at_gradient_of(trainer.model.model.layers[0], count)


def at_the_guard(trainer: ORPOTrainer) -> None:
    """When the step's gradients are added up and unscaled."""

    def ruin(handle: Any, gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * math.nan

    _at_gradient_of(trainer.model.model.norm, ruin)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler._scale = torch.tensor(1.0)  # where an overflow is no longer the scaler's to mend


POINTS: dict[str, tuple[str, Callable[[ORPOTrainer], None]]] = {
    "forward": ("step begins", in_a_forward),
    "backward": ("step begins", in_a_backward),
    "guard": ("step begins", at_the_guard),
    "callback": ("before the optimizer", lambda trainer: interrupt()),
}


def trained_again(folder: Path, at: str, spoil: Callable[[ORPOTrainer], None], options: dict[str, Any]) -> ORPOTrainer:
    """A trainer whose first training ended in its second step, and that has trained anew since."""
    trainer = make_trainer(folder, GROUPS, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    callback = At(at, lambda: spoil(trainer))
    trainer.add_callback(callback)
    with pytest.raises((torch.OutOfMemoryError, GuardStop, KeyboardInterrupt)):
        trainer.train()
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler._scale = torch.tensor(1024.0)  # where both are to begin
    trainer.train()
    return trainer


OFTEN = [("bf16", point) for point in POINTS] + [("fp16", "guard"), ("fp16", "callback")]
SELDOM = [(precision, point) for precision in PRECISIONS for point in POINTS if (precision, point) not in OFTEN]


@pytest.mark.parametrize(("precision", "point"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)])
def test_the_next_training_is_as_if_it_had_not_been(precision: str, point: str, tmp_path: Path) -> None:
    """To the bit; against one that was ended between two steps."""
    options = PRECISIONS[precision]
    found = trained_again(tmp_path / "cut", *POINTS[point], options)
    expected = trained_again(tmp_path / "clean", "step begins", lambda trainer: interrupt(), options)
    for name in ("loss", "grad_norm", "logps/chosen"):
        assert logged(found, name)[-STEPS:] == logged(expected, name)[-STEPS:], name
    for name, weight in weights(expected.model).items():
        assert torch.equal(weights(found.model)[name], weight), name


def report_trained_again(output_dir: str, *, point: str | None, parallelism: str) -> None:
    """As one rank of several, where all are ended at one point (None: between two steps): what is logged, and the weights."""
    at, spoil = ("step begins", lambda trainer: interrupt()) if point is None else POINTS[point]
    trainer = trained_again(Path(output_dir), at, spoil, {"parallelism": parallelism})
    found = {name: weight.contiguous() for name, weight in weights(trainer.model).items()}
    if trainer.ranks.is_first:
        save_file(found, Path(output_dir) / "weights.safetensors")
        log = {name: logged(trainer, name)[-STEPS:] for name in ("loss", "grad_norm", "logps/chosen")}
        (Path(output_dir) / "log.json").write_text(json.dumps(log))


NEEDS_RESET = pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot forget a pass that was cut short")
NEEDS_DEEPSPEED = [pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")]


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param("fsdp2", marks=[pytest.mark.slow, NEEDS_RESET]),
        pytest.param("zero2", marks=NEEDS_DEEPSPEED),
        pytest.param("zero3", marks=NEEDS_DEEPSPEED),
    ],
)
def test_the_next_training_of_several_processes_is_as_if_it_had_not_been(
    parallelism: str, point: str, forks: Zygote, tmp_path: Path
) -> None:
    """What was gathered for a layer, gradients that wait to be sent, and those of the first micro-batch are forgotten too."""
    for name, ended_at in (("cut", point), ("clean", None)):
        logs = [tmp_path / f"{name}-{rank}.log" for rank in range(2)]
        (tmp_path / name).mkdir()
        job = "training.test_cut_short:report_trained_again"
        ends = forks.run_ranks(job, logs, output_dir=str(tmp_path / name), point=ended_at, parallelism=parallelism)
        assert [end.status for end in ends] == [0, 0], "\n".join(log.read_text() for log in logs)
    found, expected = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("cut", "clean"))
    assert found == expected
    cut, clean = (load_file(tmp_path / name / "weights.safetensors") for name in ("cut", "clean"))
    assert all(torch.equal(cut[name], weight) for name, weight in clean.items())


def step_of(trainer: ORPOTrainer) -> StepBatch:
    sampler = StepSampler(GROUPS[:8], rows_per_step=8, max_rows=2, max_tokens=2**20)
    return StepDataset(GROUPS[:8])[sampler.plan(range(8))]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_who_catches_it_and_makes_the_step_again_gets_its_gradients_and_its_sums_once(architecture: str, tmp_path: Path) -> None:
    """As a benchmark does that tries how much fits into memory."""
    trainers = []
    for name in ("cut", "clean"):
        model = build_tiny_model(architecture, num_layers=2)
        trainer = make_trainer(tmp_path / name, GROUPS, model=model, bf16=True)
        trainer.create_optimizer()
        _ = trainer.engine
        if name == "cut":
            in_a_forward(trainer)
            with pytest.raises(torch.OutOfMemoryError):
                trainer.training_step(trainer.model, step_of(trainer))
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            assert trainer.sums.values.sum() == 0
        trainer.training_step(trainer.model, step_of(trainer))
        trainers.append(trainer)
    cut, clean = trainers
    assert torch.equal(cut.sums.values, clean.sums.values)
    assert cut.sums.values.sum() != 0
    assert (cut.sums.load_YE is None) == (architecture == "llama")
    if cut.sums.load_YE is not None:
        assert torch.equal(cut.sums.load_YE, clean.sums.load_YE)
    for left, right in zip(cut.model.parameters(), clean.model.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        assert left.grad is None or torch.equal(left.grad, right.grad)


def test_an_optimizer_step_that_fails_keeps_no_factor_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo.engine.precision import MasterAdamW

    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MasterAdamW([weight], lr=0.1)
    monkeypatch.setattr(MasterAdamW, "PIECEWISE", ())
    weight.grad = torch.ones(4).to_sparse()  # the kernel takes no such gradient
    optimizer.gradient_scale = 0.5
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()
    assert optimizer.gradient_scale == 1.0
