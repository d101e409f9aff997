"""How often the host waits for the device in a step, and that steps which are made ready ahead are the same steps.

On a CPU nothing waits, but what would wait on a GPU can be counted: every number that is asked of a tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from orpo.engine import attention, head
from orpo.training.ahead import Ahead
from randomgroups import random_groups
from trainerruns import logged, make_trainer

_ASKING_METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)
_ASKING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "unique_dim")


class Asked(TorchDispatchMode):
    """Counts what would have a GPU's host wait: single numbers, lists, and results whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._methods = _Methods(self)

    def __enter__(self) -> Asked:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        super().__exit__(*what)
        self._methods.__exit__(*what)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket._qualified_op_name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or function.overloadpacket._qualified_op_name.removeprefix("aten::") in _ASKING_OPERATORS
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """What reads a CPU's memory without any operator."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.count += function in _ASKING_METHODS
        return function(*args, **(kwargs or {}))


class PerStep(TrainerCallback):
    """What was asked from the end of a step to the end of the next."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.counts, self._last = asked, [], 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.counts.append(self.asked.count - self._last)
        self._last = self.asked.count


class Curious(TrainerCallback):
    """Wants to know one number more."""

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        float(next(model.parameters()).detach().sum())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways that a CPU has for itself are left out."""
    monkeypatch.setattr(head, "ASKING_IS_FREE", ())
    monkeypatch.setattr(attention, "BLOCK_DEVICES", ())


def asked_per_step(folder: Path, *, arguments: dict[str, Any] | None = None, more: list[Any] | None = None, **options: Any) -> list[int]:
    groups = random_groups(32, kinds=("pair", "four", "sft"), prompt=(4, 12), answer=(2, 9))  # one epoch: a new one is shuffled on the host
    options = {"optim": "adamw_torch_fused", "max_steps": 7, "logging_steps": 1000, **options}
    trainer = make_trainer(folder, groups, arguments=arguments, **options)
    asked = Asked()
    per_step = PerStep(asked)
    for callback in (*(more or []), per_step):
        trainer.add_callback(callback)
    with asked:
        trainer.train()
    return per_step.counts[1:]  # the first has the start of the run in it


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_the_host_asks_once_per_step(options: dict[str, Any], tmp_path: Path) -> None:
    assert asked_per_step(tmp_path, **options) == [1] * 6


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_question_more_is_noticed(tmp_path: Path) -> None:
    assert asked_per_step(tmp_path, more=[Curious()]) == [2] * 6


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_log_costs_two_questions_more(tmp_path: Path) -> None:
    """transformers' own sum of losses, and the sums of the metrics."""
    assert max(asked_per_step(tmp_path, logging_steps=1)) == 3


def test_steps_made_ahead_are_the_same_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two epochs with a ragged end, against a trainer that makes each step when it is asked for."""
    groups = random_groups(11, kinds=("pair", "four"), prompt=(4, 12), answer=(2, 9))
    ahead = logged(_trained(tmp_path / "ahead", groups))
    monkeypatch.setattr(Ahead, "take", lambda self, steps, count: self._fetch(steps, count))
    assert ahead == logged(_trained(tmp_path / "plain", groups))


def _trained(folder: Path, groups: Any) -> Any:
    trainer = make_trainer(folder, groups, num_train_epochs=2)
    trainer.train()
    return trainer


def test_a_step_that_cannot_be_made_stops_the_run_where_it_is_asked_for() -> None:
    def steps() -> Any:
        yield "one"
        raise OSError("the disk is gone")

    ahead, iterator = Ahead(is_pinned=False), steps()
    assert ahead.take(iterator, 1) == ["one"]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(iterator, 1)
    ahead.close()
    assert Ahead(is_pinned=False).take(iter([]), 1) == []


def test_graphs_that_are_compiled_in_the_middle_of_a_run_are_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that has torch trace a new function at steps 1 and 6 stands for a kernel that meets a shape it was not made for."""

    class Compiles(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step in (1, 6):
                torch.compile(lambda x: x + state.global_step, backend="eager")(torch.ones(2))

    torch._dynamo.reset()
    trainer = make_trainer(tmp_path, random_groups(16), max_steps=8)
    trainer.callback_handler.callbacks.insert(0, Compiles())
    trainer.train()
    assert (trainer.graphs.num_graphs, trainer.graphs.num_late) == (2, 1)
    (told,) = [record.getMessage() for record in caplog.records if "in the middle of the run" in record.getMessage()]
    assert told.startswith("step 6: torch compiled 1 more graph in")
