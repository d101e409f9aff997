"""What this package relies on of transformers and accelerate beyond their documents, so that an upgrade fails here and not in a run.

Nothing is listed that can be read: which methods are overridden comes from the classes, what they call and read of the Trainer from their
source, and what the Trainer calls of them from its own. A new override is checked as soon as it is there; only that a hook has vanished
altogether needs a list, `HOOKS`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerState

import orpo
from orpo import ORPOConfig, ORPOTrainer
from randomgroups import random_groups
from trainerruns import make_trainer

HOOKS = {
    "_clip_grad_norm", "_evaluate", "_finish_current_push", "_get_grad_norm", "_hp_search_setup", "_load_best_model",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler", "_move_model_to_device",
    "_push_from_checkpoint", "_save",
    "_save_checkpoint", "call_model_init", "compute_loss", "create_accelerator_and_postprocess",
    "create_optimizer", "evaluation_loop", "floating_point_ops", "get_batch_samples",
    "get_eval_dataloader", "get_test_dataloader", "get_total_train_batch_size", "get_train_dataloader", "hyperparameter_search",
    "init_hf_repo", "log", "push_to_hub", "save_model", "train", "training_step",
}  # fmt: skip
"""Every method of the Trainer that is overridden. One that transformers drops would go on here as a method that nobody calls."""

FOR_USERS = {"compute_loss", "get_test_dataloader", "hyperparameter_search", "push_to_hub", "train"}
"""Those that a user calls, and the Trainer need not."""


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(orpo.__path__, "orpo."):
        if info.name.startswith(("orpo.training", "orpo.config", "orpo.engine.precision", "orpo.cli.progress")):
            yield importlib.import_module(info.name)


def _is_theirs(kind: type) -> bool:
    return kind.__module__.startswith(("transformers.", "accelerate."))


@cache
def _classes() -> list[tuple[type, type]]:
    """Our classes, each with the class of transformers or accelerate that it stands in front of or comes from."""
    found: dict[type, type] = {}
    for module in _modules():
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                base = next((base for base in kind.__mro__ if _is_theirs(base)), None)
                if base is not None:
                    found[kind] = base
    # Mixins say what they stand in front of to a type checker alone.
    found |= {kind: Trainer for kind in ORPOTrainer.__mro__ if kind.__module__.startswith("orpo.")}
    return sorted(found.items(), key=lambda item: item[0].__qualname__)


def _overrides() -> list[Any]:
    """(our class, their class, name of a method that both have)."""
    return [
        pytest.param(ours, theirs, name, id=f"{ours.__name__}.{name}")
        for ours, theirs in _classes()
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and inspect.isfunction(inspect.getattr_static(theirs, name, None)) and name != "__init__"
    ]


@cache
def _tree(kind: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(kind)))


@cache
def _calls_of_package(package: str) -> dict[str, list[ast.Call]]:
    """Calls `….name(…)` in the files of transformers that drive a Trainer, by name."""
    root = Path(transformers.__file__).parent
    paths = [root / "trainer.py", root / "trainer_callback.py", root / "trainer_utils.py", *(root / "integrations").glob("*.py")]
    found: dict[str, list[ast.Call]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_named(node.func.value, "self", "trainer"):
                found.setdefault(node.func.attr, []).append(node)
    return found


def _binds(function: Any, call: ast.Call) -> bool:
    """Whether the arguments of a call fit a method; what a star hands over is not known and fits."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    is_open = len(positional) < len(call.args) or len(keywords) < len(call.keywords)
    signature = inspect.signature(function)
    try:
        (signature.bind_partial if is_open else signature.bind)(None, *positional, **keywords)
    except TypeError:
        return False
    return True


def test_the_overridden_methods_are_those_that_are_known() -> None:
    """Add a new override to `HOOKS`; look for the new name of one that is gone."""
    found = {name for ours, theirs in _classes() if theirs is Trainer for name in vars(ours) if inspect.isfunction(vars(Trainer).get(name))}
    assert found - {"__init__"} == HOOKS


@pytest.mark.parametrize("name", sorted(HOOKS - FOR_USERS))
def test_every_hook_is_called(name: str) -> None:
    assert name in _calls_of_package("transformers"), f"transformers {transformers.__version__} no longer calls Trainer.{name}"


@pytest.mark.parametrize(("ours", "theirs", "name"), _overrides())
def test_an_override_takes_what_it_is_given(ours: type, theirs: type, name: str) -> None:
    """All that the method it replaces could be given, and every call that transformers makes of it."""
    mine, original = vars(ours)[name], inspect.getattr_static(theirs, name)
    parameters = list(inspect.signature(original).parameters.values())[1:]
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    by_place = [item for item in named if item.kind is not item.KEYWORD_ONLY]
    signature = inspect.signature(mine)
    signature.bind(None, *by_place, **{item.name: item for item in named if item.kind is item.KEYWORD_ONLY})
    signature.bind(None, **{item.name: item for item in named if item.kind is not item.POSITIONAL_ONLY})
    if theirs is Trainer:
        unfit = [ast.unparse(call) for call in _calls_of_package("transformers").get(name, []) if not _binds(mine, call)]
        assert not unfit


def test_callbacks_have_no_event_that_is_never_called() -> None:
    unknown = [
        f"{ours.__name__}.{name}"
        for ours, theirs in _classes()
        if issubclass(ours, TrainerCallback)
        for name in vars(ours)
        if name.startswith("on_") and not hasattr(theirs, name)
    ]
    assert not unknown


def _own_names() -> set[str]:
    """What our classes in front of the Trainer define or set themselves."""
    names: set[str] = set()
    for ours, theirs in _classes():
        if theirs is Trainer:
            names |= set(vars(ours)) | set(ours.__annotations__)
            for node in ast.walk(_tree(ours)):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                    names.add(node.attr)
    return names


def _is_named(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_self(node: ast.expr) -> bool:
    return _is_named(node, "self")


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _attributes(is_of: Any) -> list[tuple[str, ast.Attribute]]:
    return [
        (f"{ours.__name__}: {ast.unparse(node)}", node)
        for ours, theirs in _classes()
        if theirs is Trainer
        for node in ast.walk(_tree(ours))
        if isinstance(node, ast.Attribute) and is_of(node.value)
    ]


def test_what_is_read_of_the_trainer_is_there() -> None:
    """Methods, and attributes that its constructor or its loop set."""
    theirs = {name for kind in Trainer.__mro__ for name in vars(kind)}
    theirs |= {
        node.attr
        for node in ast.walk(_tree(Trainer))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
    }
    own = _own_names()
    missing = {text for text, node in _attributes(_is_self) if node.attr not in theirs | own}
    missing |= {text for text, node in _attributes(_is_super) if node.attr not in theirs}
    assert not missing


def test_what_is_called_of_the_trainer_takes_these_arguments() -> None:
    own, unfit = _own_names(), []
    for ours, theirs in _classes():
        if theirs is not Trainer:
            continue
        for node in ast.walk(_tree(ours)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            is_theirs = _is_super(node.func.value) or (_is_self(node.func.value) and node.func.attr not in own)
            method = inspect.getattr_static(Trainer, node.func.attr, None)
            if is_theirs and inspect.isfunction(method) and not _binds(method, node):
                unfit.append(f"{ours.__name__}: {ast.unparse(node)}")
    assert not unfit


def test_what_is_used_of_accelerate_is_there() -> None:
    """`self.accelerator.…` wherever our classes have it, and which micro-batch is the last, as its DeepSpeed engine must be told."""
    made = {
        node.attr
        for node in ast.walk(_tree(Accelerator))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
    }
    used = _attributes(lambda value: isinstance(value, ast.Attribute) and value.attr == "accelerator")
    assert {"backward", "scaler"} <= {node.attr for _, node in used}
    assert not [text for text, node in used if not hasattr(Accelerator, node.attr) and node.attr not in made]
    inspect.signature(Accelerator.backward).bind(None, None, scale_wrt_gas=False)
    inspect.signature(Accelerator.no_sync).bind(None, None)
    inspect.signature(DeepSpeedEngineWrapper.backward).bind(None, None, sync_gradients=False, scale_wrt_gas=False)
    inspect.signature(GradientState._set_sync_gradients).bind(None, True)


def test_the_options_that_are_read_and_set_under_private_names_are_there() -> None:
    assert isinstance(TrainingArguments._VALID_DICT_FIELDS, list)
    args = ORPOConfig(use_cpu=True)
    assert args.n_gpu == args._n_gpu
    assert args.get_warmup_steps(10) == 1


def test_the_handler_of_callbacks_keeps_its_state_in_its_dict() -> None:
    handler = CallbackHandler([], None, None, None, None)
    assert {"callbacks", "model", "optimizer", "lr_scheduler", "train_dataloader"} <= set(vars(handler))


def test_the_state_of_a_training_and_its_number_of_steps(tmp_path: Path) -> None:
    """A file that is read without a Trainer, and the last of the values of which the loop is made."""
    state = TrainerState(max_steps=8, global_step=3, best_global_step=2)
    state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")) == state
    assert state.stateful_callbacks == {}
    trainer = make_trainer(tmp_path / "run", random_groups(9), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=1)
    assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1] == 10


def test_a_compiled_template_has_its_clock_among_its_globals() -> None:
    """Where the date that a template prints can be fixed: a keyword of `apply_chat_template` does not reach it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template("{{ strftime_now('%Y') }}")
    assert callable(compiled.globals["strftime_now"])
    compiled.globals["strftime_now"] = lambda form: f"then {form}"
    try:
        assert compiled.render() == "then %Y"
    finally:
        _compile_jinja_template.cache_clear()
