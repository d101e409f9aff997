"""Whether the optimizer that a configuration names can be made, and goes with steps that are made of micro-batches.

transformers finds out after the model has been loaded, with errors of a dozen kinds; here it is asked before, with one small layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from orpo.config.values import did_you_mean
from orpo.errors import UserError

_ALWAYS_THERE = frozenset({"adamw_torch", "adamw_torch_fused"})
"""Those that need no package and take no arguments."""
_IN_THE_BACKWARD_PASS = ("lomo", "adalomo")
"""They change weights as gradients arrive; names that end in `layerwise` do so too."""
ARGUMENTS = (
    *("momentum", "dampening", "nesterov", "weight_decay", "lr_decay", "eps", "alpha", "centered", "beta1", "beta2", "beta3", "t_alpha"),
    *("t_beta3", "rank", "update_proj_gap", "scale", "proj_type", "proj", "scale_type", "use_kahan_summation", "momentum_dtype"),
    *("variance_dtype", "compensation_buffer_dtype", "alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    *("block_size", "bf16_stochastic_round", "weight_lr_power", "r", "max_lr", "kahan_sum", "decouple_lr"),
)
"""Every key that transformers reads from `optim_args` for one optimizer or another; a test holds it to the installed version."""
_PROBES = ("0.0625", "3", "true", "false", "bfloat16", "float64", "x")
"""Values of which at least two differ in effect wherever a key has one, whatever its type and default."""
_OWN_OPTIONS = {
    **dict.fromkeys(("lr", "learning_rate"), "learning_rate"), "eps": "adam_epsilon", "weight_decay": "weight_decay",
    **dict.fromkeys(("beta1", "adam_beta1"), "adam_beta1"), **dict.fromkeys(("beta2", "adam_beta2"), "adam_beta2"),
    **dict.fromkeys(("betas", "adam_betas"), "adam_beta1 and adam_beta2"),
}  # fmt: skip
"""What is an option of the run, where an optimizer does not take it as an argument."""
_ADAM_OPTIONS = {"adam_beta1": 0.123, "adam_beta2": 0.456, "adam_epsilon": 0.789}


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
    return _unread_problems(name, values) if problem is None else [problem]


def optimizer_notes(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Options that were given and that the chosen optimizer does not look at; of a configuration without problems.

    Args:
        given: the options that somebody wrote.
    """
    name = str(getattr(values.get("optim"), "value", values.get("optim")))
    notes = []
    if "optim_target_modules" in given and not name.startswith(("galore", "apollo")):
        notes.append(f"optim_target_modules has no effect with optim: {name}; galore and apollo read it")
    if name in _ALWAYS_THERE or not (named := [key for key in _ADAM_OPTIONS if key in given]):
        return notes
    layer = _layer()
    before = _made(values, layer)
    idle = [key for key in named if _made({**values, key: _ADAM_OPTIONS[key]}, layer) == before]
    return notes + ([f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect with optim: {name}"] if idle else [])


def _unread_problems(name: str, values: dict[str, Any]) -> list[UserError]:
    """Keys of `optim_args` that change nothing, whatever their value: transformers picks those it knows and forgets the others."""
    given = [part.partition("=")[0] for part in str(values.get("optim_args") or "").replace(" ", "").split(",") if part]
    unread = [key for key in dict.fromkeys(given) if not _is_read(key, values)]
    if not unread:
        return []
    taken = [key for key in ARGUMENTS if _is_read(key, values)]
    expected = f"what {name} takes: {', '.join(taken)}" if taken else f"nothing: {name} takes no arguments"
    problems = []
    for key in unread:
        own = _OWN_OPTIONS.get(key)
        mend = f"give it as the option {own}" if own else did_you_mean(key, taken) or "leave it out"
        problems.append(UserError(f"{key!r} is read by nothing", where="optim_args", expected=expected, mend=mend))
    return problems


def _is_read(key: str, values: Mapping[str, Any]) -> bool:
    layer = _layer()
    made = [_made({**values, "optim_args": f"{key}={probe}"}, layer) for probe in _PROBES]
    return any(one != made[0] for one in made)


def _made(values: Mapping[str, Any], layer: Any) -> Any:
    """What transformers would make the optimizer of, to be compared; text where it raises."""
    from transformers import Trainer

    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(_arguments(values), layer)
    except Exception as error:  # of a dozen kinds
        return type(error).__name__
    return made, {key: value for key, value in options.items() if key != "model"}


def _argument_problem(given: Any) -> UserError | None:
    parts = str(given or "").replace(" ", "").split(",") if given else []
    wrong = [part for part in parts if not re.fullmatch(r"[^=]+=[^=]+", part)]
    if not wrong:
        return None
    return UserError(f"found {wrong[0]!r}", where="optim_args", expected="key=value, several parted by commas: momentum=0.9,nesterov=true")


def _trial_problem(name: str, values: dict[str, Any]) -> UserError | None:
    """Make the optimizer for one small layer, as transformers will for the model."""
    from transformers import Trainer

    layer = _layer()
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(_arguments(values), layer)
        parameters = options.pop("params", None) or options.pop("optimizer_dict", None) or layer.parameters()
        made(parameters, **{key: value for key, value in options.items() if key != "model"})
    except Exception as error:  # of a dozen kinds
        return explain_optimizer(error, name, given=values.get("optim_args"))
    if name.startswith(("galore", "apollo")) and values.get("optim_target_modules") is None:
        return UserError(f"{name} needs optim_target_modules", where="optim", mend="optim_target_modules: all-linear, or names of layers")
    return None


def _layer() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(2, 2))


def _arguments(values: Mapping[str, Any]) -> Any:
    """The options that transformers looks at to make an optimizer."""
    from transformers.training_args import ParallelMode

    keys = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps")
    return SimpleNamespace(
        **{key: values.get(key) for key in keys},
        optim_target_modules="all-linear",
        gradient_accumulation_steps=1,
        parallel_mode=ParallelMode.NOT_DISTRIBUTED,
    )


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
