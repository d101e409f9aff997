"""Whether the optimizer that a configuration names can be made, and goes with steps that are made of micro-batches.

transformers finds out after the model has been loaded, with errors of a dozen kinds; here it is asked before, with one small layer.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from orpo.errors import UserError

_ALWAYS_THERE = frozenset({"adamw_torch", "adamw_torch_fused"})
"""Those that need no package and take no arguments."""
_IN_THE_BACKWARD_PASS = ("lomo", "adalomo")
"""They change weights as gradients arrive; names that end in `layerwise` do so too."""


def optimizer_problems(values: dict[str, Any]) -> list[UserError]:
    """What is wrong with `optim`, `optim_args` and `optim_target_modules`, as far as it can be known without the model."""
    name = str(getattr(values.get("optim"), "value", values.get("optim")))
    if "optim" not in values or (name in _ALWAYS_THERE and not values.get("optim_args")):
        return []
    if name in _IN_THE_BACKWARD_PASS or name.endswith("_layerwise"):
        mend = f"optim: {name.removesuffix('_layerwise')}" if name.endswith("_layerwise") else "optim: adafactor, which keeps little too"
        what = f"{name} changes weights during the backward pass, before the gradient of the whole step is known"
        return [UserError(what, where="optim", expected="one that steps after it", mend=mend)]
    problem = _argument_problem(values.get("optim_args")) or _trial_problem(name, values)
    return [] if problem is None else [problem]


def _argument_problem(given: Any) -> UserError | None:
    parts = str(given or "").replace(" ", "").split(",") if given else []
    wrong = [part for part in parts if not re.fullmatch(r"[^=]+=[^=]+", part)]
    if not wrong:
        return None
    return UserError(f"found {wrong[0]!r}", where="optim_args", expected="key=value, several parted by commas: momentum=0.9,nesterov=true")


def _trial_problem(name: str, values: dict[str, Any]) -> UserError | None:
    """Make the optimizer for one small layer, as transformers will for the model."""
    import torch
    from transformers import Trainer
    from transformers.training_args import ParallelMode

    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    keys = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    arguments: Any = SimpleNamespace(
        **{key: values.get(key) for key in keys},
        optim_target_modules="all-linear",
        gradient_accumulation_steps=1,
        parallel_mode=ParallelMode.NOT_DISTRIBUTED,
    )
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
        parameters = options.pop("params", None) or options.pop("optimizer_dict", None) or layer.parameters()
        made(parameters, **{key: value for key, value in options.items() if key != "model"})
    except Exception as error:  # of a dozen kinds
        return explain_optimizer(error, name, given=values.get("optim_args"))
    if name.startswith(("galore", "apollo")) and values.get("optim_target_modules") is None:
        return UserError(f"{name} needs optim_target_modules", where="optim", mend="optim_target_modules: all-linear, or names of layers")
    return None


def explain_optimizer(error: Exception, name: str, *, given: Any = None) -> UserError:
    """What a user can do about an optimizer that cannot be made or makes no step."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    package = _package(text) or _PACKAGES.get(name)
    is_missing = isinstance(error, ImportError) or "import" in text or "install" in text
    if is_missing and package is not None:
        return UserError(
            f"{name} needs the package {package.split()[-1]}", where="optim", mend=f"pip install {package}; or optim: adamw_torch"
        )
    if given:
        return UserError(
            f"{name} with {given!r}: {text}", where="optim_args", mend="leave them out, or look them up where it is documented"
        )
    return UserError(f"{name} cannot be used: {text}", where="optim", mend="optim: adamw_torch")


_PACKAGES = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "git+https://github.com/pytorch/torchdistx",
}


def _package(text: str) -> str | None:
    """The package that transformers says to install."""
    found = re.search(r"pip install (?:-U |--upgrade )?([\w+:/.\[\]-]+[\w\]])", text)
    return found.group(1) if found else None
