"""Every check on the values of a configuration, all problems at once.

Works on plain values, so that a file and flags can be checked before there is an `ORPOConfig`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
import os
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from orpo.config import compat
from orpo.config.objectives import objective_problems, range_problem
from orpo.config.optimizers import optimizer_problems
from orpo.config.parallelism import KINDS, sharding_problems
from orpo.config.values import describe, did_you_mean, found, is_accepted, members
from orpo.data.rows.pairs import parse_policy
from orpo.errors import DataError, UserError

ENGINES = ("auto", "shared", "padded")

# name -> (lowest, is the lowest itself allowed, highest or None)
_RANGES: dict[str, tuple[float, bool, float | None]] = {
    "learning_rate": (0, False, None),
    "weight_decay": (0, True, None),
    "adam_beta1": (0, True, 1),
    "adam_beta2": (0, True, 1),
    "adam_epsilon": (0, False, None),
    "max_grad_norm": (0, True, None),
    "warmup_steps": (0, True, None),
    "num_train_epochs": (0, False, None),
    "per_device_train_batch_size": (1, True, None),
    "per_device_eval_batch_size": (1, True, None),
    "gradient_accumulation_steps": (1, True, None),
    "max_length": (2, True, None),
    "max_prompt_length": (1, True, None),
    "router_aux_loss_coef": (0, True, None),
    "logits_budget_mb": (1, True, None),
    "memory_budget_gib": (0, False, None),
    "max_tokens_per_microbatch": (1, True, None),
    "max_nonfinite_skips": (0, True, None),
    "loraplus_lr_ratio": (0, False, None),
    "logging_steps": (0, False, None),
    "save_steps": (0, False, None),
    "eval_steps": (0, False, None),
    "eval_delay": (0, True, None),
    "early_stopping_patience": (1, True, None),
    "early_stopping_threshold": (0, True, None),
    "save_total_limit": (1, True, None),
    "seed": (0, True, 2**32 - 1),
    "data_seed": (0, True, 2**63 - 1),
    "dataset_num_proc": (1, True, None),
    "stream_window": (1, True, None),
    "dataloader_num_workers": (0, True, None),
    "ddp_timeout": (1, True, None),
}
_MENDS = {
    "max_grad_norm": "0 turns gradient clipping off",
    "save_total_limit": "leave it out to keep every checkpoint",
}
# Fields whose annotation is narrower than what transformers takes from scripts in the wild.
_UNCHECKED_TYPES = frozenset(
    {"fsdp", "fsdp_config", "debug", "report_to", "deepspeed", "accelerator_config", "include_num_input_tokens_seen"}
)

_LOSS_SCALING_DEVICES = ("cuda", "xpu", "cpu")
"""Where torch has a scaler for fp16. On a CPU it is exact and slow."""

_HIGHEST_USUAL_RATE = 1e-2
# Whose step is the gradient times the rate, or which set their own scale; Adam and its kin move every weight by about the rate itself.
_OPTIMIZERS_OF_LARGE_RATES = ("sgd", "adagrad", "lomo", "adafactor", "rmsprop")
EVALUATED = (
    *("loss", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "log_odds_ratio", "log_odds_chosen"),
)
"""What an evaluation reports, each under `eval_` and its name; a test holds it to one."""
REWARDS = frozenset({"rewards/chosen", "rewards/rejected", "rewards/margins"})
"""Those that only an objective with an implicit reward reports."""

_SIMPLE_SCHEDULES = frozenset({"linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"})
"""Those that work without arguments, which need no trial."""
_SET_BY_THE_TRAINER = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})

# Those that transformers can be asked about whether they are there.
_TRACKERS_WITH_A_PACKAGE = frozenset(
    {"clearml", "codecarbon", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"}
)


def _enum_choices() -> dict[str, tuple[str, ...]]:
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    enums = {
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
    }
    choices = {name: tuple(str(item.value) for item in kind) for name, kind in enums.items()}
    return {**choices, "engine": ENGINES, "parallelism": KINDS}


def check_values(values: dict[str, Any], hints: dict[str, Any], *, is_launch: bool = True) -> list[UserError]:
    """Every problem among the values of an `ORPOConfig`; also used for a configuration that is not yet one.

    Args:
        values: field name -> value; fields that are absent are not checked.
        hints: field name -> type annotation.
        is_launch: the run begins now, with the processes that there are.
    """
    problems = _type_problems(values, hints)
    bad = {problem.where for problem in problems}
    usable = {name: value for name, value in values.items() if name not in bad}
    problems += _choice_problems(usable) + _range_problems(usable) + objective_problems(usable)
    bad = {problem.where for problem in problems}
    usable = {name: value for name, value in values.items() if name not in bad}
    problems += compat.refusals(usable) + _cross_problems(usable) + _stream_problems(usable) + _tracker_problems(usable.get("report_to"))
    problems += _schedule_problems(usable) + _checkpointing_problems(usable)
    return problems + optimizer_problems(usable) + sharding_problems(usable, os.environ, is_launch=is_launch)


def _type_problems(values: dict[str, Any], hints: dict[str, Any]) -> list[UserError]:
    problems = []
    for name, value in values.items():
        hint = hints.get(name)
        if hint is None or name in _UNCHECKED_TYPES:
            continue
        if is_accepted(hint, value):
            continue
        options = [choice for member in members(hint) for choice in typing.get_args(member) if isinstance(choice, str)]
        problems.append(UserError(f"found {found(value)}", where=name, expected=describe(hint), mend=did_you_mean(value, options)))
    return problems


def _choice_problems(values: dict[str, Any]) -> list[UserError]:
    problems = []
    for name, choices in _enum_choices().items():
        if name not in values:
            continue
        value = getattr(values[name], "value", values[name])
        if value not in choices:
            listed = ", ".join(choices) if len(choices) <= 12 else f"one of {len(choices)} names"
            problems.append(UserError(f"found {found(value)}", where=name, expected=listed, mend=did_you_mean(value, choices)))
    return problems


def _range_problems(values: dict[str, Any]) -> list[UserError]:
    return [
        problem
        for name, (lowest, is_included, highest) in _RANGES.items()
        for problem in range_problem(name, values.get(name), lowest, is_included, highest, _MENDS.get(name))
    ]


def _cross_problems(values: dict[str, Any]) -> list[UserError]:
    problems: list[UserError] = []
    get: Callable[[str], Any] = values.get
    max_length, max_prompt_length = get("max_length"), get("max_prompt_length")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        problems.append(
            UserError(
                f"found {max_prompt_length}, which leaves no room for an answer within max_length {max_length}",
                where="max_prompt_length",
                expected=f"at most {max_length - 1}",
            )
        )
    if (num_steps := get("max_steps")) is not None and num_steps != -1 and num_steps < 1:
        problems.append(UserError(f"found {num_steps}", where="max_steps", expected="a positive number, or -1 to train by epochs"))
    if get("fp16") and get("bf16"):
        problems.append(UserError("is on together with bf16", where="fp16", mend="keep bf16; drop fp16"))
    elif get("fp16") and _device_kind(values) not in _LOSS_SCALING_DEVICES:
        what = f"torch scales no losses on {_device_kind(values)}"
        problems.append(UserError(what, where="fp16", mend="leave it out; the dtype is chosen by itself"))
    if get("attention_kernel") not in (None, "auto", "sdpa") and get("engine") == "padded":
        mend = "engine: auto, or leave attention_kernel out"
        problems.append(UserError("belongs to packed rows, and the padded engine has none", where="attention_kernel", mend=mend))
    if get("trust_remote_code") and not is_pinned(values):
        problems.append(
            UserError(
                "runs code from the model's repository, and no revision says which",
                where="trust_remote_code",
                expected="model_revision with a commit hash or tag; a branch such as main can change under you",
                mend="read the code, then name its commit in model_revision; or leave trust_remote_code out",
            )
        )
    if isinstance(get("column_map"), str) and not get("column_map").startswith("{"):
        problems.append(UserError(f"found {found(get('column_map'))}", where="column_map", expected='{"prompt": "question", …}'))
    if get("pairs") is not None:
        try:
            parse_policy(get("pairs"))
        except DataError as error:
            problems.append(UserError(error.what, where="pairs", expected=error.expected, mend=error.mend))
    if _name_of(get("save_strategy")) == "best" and _name_of(get("eval_strategy")) in ("no", None) and "eval_strategy" in values:
        mend = "eval_strategy: steps or epoch, or save_strategy: steps"
        problems.append(UserError("found 'best', but nothing is evaluated on the way that could be best", where="save_strategy", mend=mend))
    if get("early_stopping_patience") is not None and _name_of(get("eval_strategy")) in (None, "no"):
        problems.append(
            UserError(
                "needs evaluations to look at", where="early_stopping_patience", mend="eval_strategy: steps (or epoch), and eval_steps"
            )
        )
    is_best_kept = get("load_best_model_at_end") and _name_of(get("save_strategy")) != "best"
    if is_best_kept and _name_of(get("eval_strategy")) != _name_of(get("save_strategy")):
        problems.append(
            UserError(
                f"needs an evaluation at every save; eval_strategy is {_name_of(get('eval_strategy'))!r} and "
                f"save_strategy {_name_of(get('save_strategy'))!r}",
                where="load_best_model_at_end",
                mend="set both to the same, or save_strategy to best",
            )
        )
    return problems


def _checkpointing_problems(values: dict[str, Any]) -> list[UserError]:
    """Settings that neither torch nor transformers know; torch would say so in the middle of the first step."""
    import torch
    from transformers import PreTrainedModel

    problems = []
    wanted = values.get("gradient_checkpointing")
    if isinstance(wanted, str) and wanted != "auto":
        mend = did_you_mean(wanted, ["auto"])
        problems.append(UserError(f"found {found(wanted)}", where="gradient_checkpointing", expected="true, false or auto", mend=mend))
    for where in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        given = values.get(where)
        if isinstance(given, str):
            given = _from_json(given)
            if not isinstance(given, dict):
                what, expected = f"found {found(values[where])}", "a mapping such as {use_reentrant: false}"
                problems.append(UserError(what, where=where, expected=expected))
        if not isinstance(given, dict):
            continue
        enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
        taken = {*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, *inspect.signature(enable).parameters}
        taken -= {"self", "function", "args", "kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}
        taken.add("preserve_rng_state")  # which torch takes among its keywords
        for key in given:
            if wanted == "auto" and (key in ("every_n_layers", "offload") or (key == "use_reentrant" and given[key])):
                problems.append(UserError(f"{key} does not go with gradient_checkpointing: auto", where=where, mend="leave it out"))
            elif key not in taken:
                expected = f"some of {', '.join(sorted(taken))}"
                problems.append(UserError(f"unknown setting {key!r}", where=where, expected=expected, mend=did_you_mean(key, taken)))
    return problems


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _stream_problems(values: dict[str, Any]) -> list[UserError]:
    """What needs the number of rows, which nobody knows of a source that is never read to its end."""
    if not values.get("streaming"):
        return []
    problems = []
    if "max_steps" in values and (values["max_steps"] or 0) < 1:
        mend = "max_steps: 1000; the source begins anew where it ends before"
        problems.append(UserError("is needed with streaming: nobody knows how many steps an epoch has", where="max_steps", mend=mend))
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if _name_of(values.get(name)) == "epoch":
            what = "found 'epoch', and a stream is not read to an end that could be waited for"
            problems.append(UserError(what, where=name, expected="no, or steps"))
    return problems


def _schedule_problems(values: dict[str, Any]) -> list[UserError]:
    """Arguments that the schedule does not take, lacks, or cannot compute with; transformers makes it after the model has been loaded."""
    given = values.get("lr_scheduler_kwargs")
    if isinstance(given, str):
        given = _from_json(given)
        if not isinstance(given, dict):
            shown = found(values["lr_scheduler_kwargs"])
            return [UserError(f"found {shown}", where="lr_scheduler_kwargs", expected="a mapping such as {min_lr: 1.0e-6}")]
    name, arguments = str(_name_of(values.get("lr_scheduler_type"))), dict(given or {})
    if "lr_scheduler_type" not in values or (not arguments and name in _SIMPLE_SCHEDULES):
        return []
    taken = _schedule_arguments(name)
    needed = [key for key, is_needed in taken.items() if is_needed]
    expected = f"what {name} takes: " + (", ".join(f"{key} (needed)" if key in needed else key for key in taken) or "nothing")
    problems = [
        UserError(f"unknown argument {key!r}", where="lr_scheduler_kwargs", expected=expected, mend=did_you_mean(key, taken))
        for key in arguments
        if key not in taken
    ]
    missing = [key for key in needed if key not in arguments]
    if missing:
        what = f"{name} needs {' and '.join(missing)}"
        mend = f"lr_scheduler_kwargs: {{{', '.join(f'{key}: …' for key in missing)}}}"
        problems.append(UserError(what, where="lr_scheduler_kwargs", expected=expected, mend=mend))
    if not problems and (failure := _try_schedule(name, arguments, values)) is not None:
        problems.append(UserError(f"{name}: {failure}", where="lr_scheduler_kwargs", expected=expected))
    return problems


def _schedule_arguments(name: str) -> dict[str, bool]:
    """What a schedule takes -> whether it must be given, read from the function or class that transformers calls."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, SchedulerType

    classes: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    parameters = inspect.signature(classes.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    return {key: item.default is item.empty for key, item in parameters.items() if key not in _SET_BY_THE_TRAINER}


def _try_schedule(name: str, arguments: dict[str, Any], values: dict[str, Any]) -> str | None:
    """What goes wrong when the schedule is made and asked for a few of its rates; None where nothing does."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=values.get("learning_rate") or 1e-5)
    num_steps = values["max_steps"] if (values.get("max_steps") or 0) > 0 else 1_000_000
    num_warmup = num_steps // 10
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = get_scheduler(name, optimizer, num_warmup, num_steps, scheduler_specific_kwargs=arguments)
        for _ in range(0 if hasattr(schedule, "lr_lambdas") else 50):  # those that follow a metric: one that does not get better
            schedule.step(1.0)
        rates = [factor(step) for factor in getattr(schedule, "lr_lambdas", ()) for step in (0, num_warmup, num_steps // 2, num_steps)]
    except Exception as error:  # whatever a schedule raises over its arguments
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    is_sound = all(isinstance(rate, (int, float)) and math.isfinite(rate) for rate in rates)
    return None if is_sound else f"the learning rate would be multiplied by {', '.join(map(str, rates))}"


def _tracker_problems(report_to: Any) -> list[UserError]:
    """Trackers that transformers does not know, or whose package is not there; it would raise after the model has been loaded."""
    given = report_to if isinstance(report_to, (list, tuple)) else [report_to]
    names = [name for name in given if isinstance(name, str)]
    if not set(names) - {"none", "all"}:
        return []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    problems = []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            mend = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            problems.append(UserError(f"found {name!r}", where="report_to", expected=f"none, all, or some of {known}", mend=mend))
        elif name in _TRACKERS_WITH_A_PACKAGE and name not in get_available_reporting_integrations():
            problems.append(UserError(f"the package of {name} is not installed", where="report_to", mend=f"pip install {name}"))
        elif name not in _TRACKERS_WITH_A_PACKAGE and (failure := _tracker_failure(name, INTEGRATION_TO_CALLBACK[name])):
            problems.append(
                UserError(f"{name} cannot be used: {failure}", where="report_to", mend="install what it needs, or leave it out")
            )
    return problems


def _tracker_failure(name: str, kind: Any) -> str | None:
    """Why a tracker cannot be made, which opens nothing yet; None where it can."""
    if name == "dagshub" and importlib.util.find_spec("mlflow") is None:  # it would complain once more when it is thrown away
        return "it needs dagshub and mlflow"
    try:
        kind()
    except Exception as error:  # each integration has its own
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _name_of(value: Any) -> Any:
    return getattr(value, "value", value)


def _device_kind(values: dict[str, Any]) -> str:
    import torch

    device = None if values.get("use_cpu") else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def is_pinned(values: dict[str, Any]) -> bool:
    """Whether the model's revision is named, in `model_revision` or in `model_init_kwargs`, and is not the moving `main`."""
    kwargs = values.get("model_init_kwargs")
    revision = values.get("model_revision") or (kwargs.get("revision") if isinstance(kwargs, dict) else None)
    return revision not in (None, "", "main")


def value_notes(values: dict[str, Any]) -> list[str]:
    """What is allowed and yet hardly meant, one line each."""
    notes = []
    if values.get("fp16") and _device_kind(values) == "cpu":
        notes.append(
            "fp16 on a CPU is slower than float32, which needs no loss scaling either; leave it out, the dtype is chosen by itself"
        )
    rate, optimizer = values.get("learning_rate"), str(_name_of(values.get("optim")))
    if rate is None or rate <= _HIGHEST_USUAL_RATE or any(name in optimizer for name in _OPTIMIZERS_OF_LARGE_RATES):
        return notes
    return [
        *notes,
        f"learning_rate {rate:g} is far above what fine-tuning stands (about 1e-6 to 1e-3): expect it to destroy the weights within a few "
        "steps; 8e-6 is the default, small models and adapters take 5e-5 to 5e-4",
    ]


def best_metric_problems(metric: str | None, *, has_reward: bool = True, sets: Sequence[str] = ()) -> list[UserError]:
    """A metric that no evaluation reports; transformers would look for it at the first one.

    Args:
        has_reward: whether the objective has rewards to report.
        sets: names of the evaluation sets where there are several, which then stand before the metric's.
    """
    reported = [name for name in EVALUATED if has_reward or name not in REWARDS]
    reported += [f"{one}_{name}" for one in sets for name in reported]
    if metric is None or (wanted := metric.removeprefix("eval_")) in reported:
        return []
    by_last_word = {one.rpartition("/")[2]: one for one in reversed(reported)}
    near = difflib.get_close_matches(wanted, reported, n=1, cutoff=0.6)
    near = near or [by_last_word[word] for word in difflib.get_close_matches(wanted, by_last_word, n=1, cutoff=0.5)]
    mend = f"did you mean {near[0]!r}?" if near else None
    return [UserError(f"found {metric!r}", where="metric_for_best_model", expected=f"one of {', '.join(reported)}", mend=mend)]
