"""How a run is spread over its processes, from whichever way it was asked for: `parallelism`, transformers' `fsdp` and `fsdp_config`,
`deepspeed`, or an `accelerate launch` configuration. What was asked for and is not done is a problem, never a quiet fallback.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from orpo.config.deepspeed import read_deepspeed, zero_obstacles
from orpo.errors import UserError
from orpo.system.place import read_place

KINDS = ("auto", "ddp", "fsdp2", "zero2", "zero3")
_ON = ("true", "1", "yes", "y", "on", "t")
_MEND = "leave it out: the processes then train by DDP, each with the whole model"

# transformers' words for `fsdp`; those of FSDP1 mean what they say under FSDP2 too.
_WORDS = ("full_shard", "shard_grad_op", "hybrid_shard", "offload", "auto_wrap", "no_shard", "hybrid_shard_zero2")

# Settings of FSDP1, of loading and of how accelerate saves, which change nothing here.
_WITHOUT_EFFECT = frozenset(
    {"state_dict_type", "cpu_ram_efficient_loading", "sync_module_states", "use_orig_params", "forward_prefetch", "backward_prefetch"}
    | {"limit_all_gathers", "min_num_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "activation_checkpointing_offload"}
)
_KNOWN = _WITHOUT_EFFECT | {
    *("version", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "reshard_after_forward", "cpu_offload", "offload_params"),
    *("activation_checkpointing", "sharding_strategy", "ignored_modules"),
}
_ACCELERATE_WANTS = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
_MASKED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How weights and gradients are spread.

    Attributes:
        kind: "ddp" (every process has the whole model), "fsdp2", "zero2" or "zero3".
        asked_by: the option or variable that asks for it.
        layers: class names of the layers to gather one at a time; none: the model's own.
        reshards: give a layer's weights back between forward and backward.
        offloads: keep shards in host memory.
        is_hybrid: shard inside each machine, copies between machines.
        zero: DeepSpeed's configuration, as it is passed on; empty where it does nothing.
    """

    kind: str = "ddp"
    asked_by: str = ""
    layers: tuple[str, ...] = ()
    reshards: bool = True
    offloads: bool = False
    is_hybrid: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_sharded(self) -> bool:
        return self.kind != "ddp"

    @property
    def spreads_weights(self) -> bool:
        """Whether the weights themselves are in parts: process 0 alone reads them, and sends each layer to the others as it is spread."""
        return self.kind in ("fsdp2", "zero3")


def parallelism_of(values: Mapping[str, Any], environ: Mapping[str, str]) -> Parallelism:
    """What a configuration without problems asks for."""
    return _read(values, environ)[0]


SHARDING_KEYS = ("parallelism", "fsdp", "fsdp_config", "deepspeed")
"""Options that ask for it."""


def not_spread_here(values: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    """What to tell where a sharded run is asked for and there is one process: that is, whoever looks ahead of the run; else None."""
    wanted = parallelism_of(values, environ)
    try:
        if not wanted.is_sharded or read_place(environ).world_size > 1:
            return None
    except UserError:  # which is told when the processes meet
        return None
    missing = "; the package deepspeed, which it needs, is not installed here" if wanted.zero and find_spec("deepspeed") is None else ""
    return f"{wanted.asked_by}: {wanted.kind} is for several processes (orpo train --num_processes N), and here is one{missing}"


def sharding_problems(values: Mapping[str, Any], environ: Mapping[str, str], *, is_launch: bool = True) -> list[UserError]:
    """Every way to ask for a sharded run that would not be one.

    Args:
        is_launch: the run begins now, with these processes; else they come later, perhaps elsewhere.
    """
    wanted, problems = _read(values, environ)
    for name, what in _ACCELERATE_WANTS.items():
        if is_on(environ, name):
            told = f"accelerate was told to use {what}, which is not supported"
            problems.append(UserError(told, where=name, mend="choose another accelerate configuration"))
    if values.get("parallelism_config"):
        problems.append(UserError("is not supported", where="parallelism_config", mend=_MEND))
    if wanted.is_sharded and not problems:
        problems += _obstacles(wanted, values, environ, is_launch=is_launch)
    return problems


def _read(values: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Parallelism, list[UserError]]:
    plain = values.get("parallelism") or "auto"
    if not isinstance(plain, str) or plain not in KINDS:  # which is told with the other choices
        return Parallelism(), []
    wanted, problems = _fsdp(values, environ)
    if zero_by := _zero_by(values, environ):
        if wanted.is_sharded:
            problems.append(UserError(f"asks for ZeRO, and {wanted.asked_by} for FSDP", where=zero_by, mend="leave one of the two out"))
        settings, of_zero = read_deepspeed(values, environ, where=zero_by)
        wanted, problems = Parallelism(f"zero{settings['zero_optimization']['stage']}", zero_by, zero=settings), problems + of_zero
    if plain not in ("auto", wanted.kind):
        what = {"ddp": "DDP", "fsdp2": "FSDP"}.get(wanted.kind, wanted.kind.replace("zero", "ZeRO-"))
        problems.append(
            UserError(f"is {plain}, and another option asks for {what}", where="parallelism", mend=f"leave {wanted.asked_by} out")
        )
    return wanted, problems


def _zero_by(values: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """The option or variable that asks for ZeRO."""
    if values.get("deepspeed"):
        return "deepspeed"
    if is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return "ACCELERATE_USE_DEEPSPEED"
    return "parallelism" if str(values.get("parallelism")).startswith("zero") else ""


def _fsdp(values: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Parallelism, list[UserError]]:
    given = values.get("fsdp")
    settings, problems = _settings(values.get("fsdp_config"))
    words = _words(given)
    asked_by = "fsdp" if words else ""
    if not words and is_on(environ, "ACCELERATE_USE_FSDP"):
        asked_by, words = "ACCELERATE_USE_FSDP", ["full_shard"]
        settings = {**_from_accelerate(environ), **settings}
    if not asked_by and values.get("parallelism") == "fsdp2":
        asked_by, words = "parallelism", ["full_shard"]
    if not asked_by:
        if settings or problems:
            problems.append(UserError("is read only where FSDP is on", where="fsdp_config", mend="parallelism: fsdp2"))
        return Parallelism(), problems
    if unknown := [word for word in words if word not in _WORDS]:
        close = difflib.get_close_matches(unknown[0], _WORDS, n=1)
        mend = f"did you mean {close[0]!r}?" if close else None
        problems.append(UserError(f"found {unknown[0]!r}", where="fsdp", expected="true, or some of " + ", ".join(_WORDS), mend=mend))
    if "no_shard" in words:
        problems.append(UserError("no_shard is DDP", where="fsdp", mend="parallelism: ddp"))
    wanted = Parallelism("fsdp2", asked_by, reshards="shard_grad_op" not in words, offloads="offload" in words)
    wanted = replace(wanted, is_hybrid=any(word.startswith("hybrid_shard") for word in words))
    return _with_settings(wanted, settings, problems)


def _words(given: Any) -> list[str]:
    if not given or str(given).lower() in ("false", "no", "off", "none"):
        return []
    if given is True or str(given).lower() in _ON:
        return ["full_shard"]
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    return [word for item in items for word in str(getattr(item, "value", item)).replace(",", " ").split()]


def _settings(given: Any) -> tuple[dict[str, Any], list[UserError]]:
    """`fsdp_config` as a mapping without its `fsdp_` prefixes, read from its file where it is one."""
    if not given:
        return {}, []
    if isinstance(given, str):
        try:
            text = given if given.lstrip().startswith("{") else open(given, encoding="utf-8").read()  # noqa: SIM115
            given = json.loads(text)
        except (OSError, ValueError) as error:
            return {}, [UserError(f"cannot be read: {error}", where="fsdp_config", expected="a JSON file, or a mapping")]
    if not isinstance(given, Mapping):
        return {}, [UserError(f"found a {type(given).__name__}", where="fsdp_config", expected="a JSON file, or a mapping")]
    settings = {str(name).removeprefix("fsdp_"): value for name, value in given.items()}
    problems = []
    for name in settings:
        if name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "leave it out"
            problems.append(UserError(f"unknown setting {name!r}", where="fsdp_config", mend=mend))
    return settings, problems


def _from_accelerate(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {name.removeprefix("FSDP_").lower(): value for name, value in environ.items() if name.startswith("FSDP_")}
    settings = {name: value for name, value in names.items() if name in _KNOWN}
    if "transformer_cls_to_wrap" in names:
        settings["transformer_layer_cls_to_wrap"] = names["transformer_cls_to_wrap"]
    return settings


def _with_settings(wanted: Parallelism, settings: Mapping[str, Any], problems: list[UserError]) -> tuple[Parallelism, list[UserError]]:
    where = "fsdp_config" if wanted.asked_by != "ACCELERATE_USE_FSDP" else "accelerate launch"
    if str(settings.get("version", 2)) != "2":
        problems.append(UserError(f"version is {settings['version']}", where=where, expected="version 2, FSDP2", mend="fsdp_version: 2"))
    policy = str(settings.get("auto_wrap_policy") or "TRANSFORMER_BASED_WRAP").upper()
    if policy not in ("TRANSFORMER_BASED_WRAP", "NO_WRAP"):
        problems.append(UserError(f"auto_wrap_policy is {policy}", where=where, expected="TRANSFORMER_BASED_WRAP"))
    if _is_true(settings.get("activation_checkpointing", False)):
        mend = "gradient_checkpointing: true, and activation_checkpointing off"
        problems.append(UserError("activation_checkpointing would be a second way", where=where, mend=mend))
    for name in ("xla", "ignored_modules"):
        if settings.get(name):
            problems.append(UserError(f"{name} is not supported", where=where, mend="leave it out"))
    names = settings.get("transformer_layer_cls_to_wrap") or []
    layers = tuple(map(str, names if isinstance(names, (list, tuple)) else str(names).replace(",", " ").split()))
    reshards = settings.get("reshard_after_forward", wanted.reshards)
    strategy = str(reshards).upper()  # of FSDP1 it is a strategy's name, also as a number
    is_kept = strategy in ("SHARD_GRAD_OP", "2") or not (_is_true(reshards) or strategy in ("FULL_SHARD", "1", "HYBRID_SHARD"))
    offloads = wanted.offloads or any(_is_true(settings.get(name, False)) for name in ("cpu_offload", "offload_params"))
    return replace(wanted, layers=layers, reshards=not is_kept, offloads=offloads), problems


def _is_true(value: Any) -> bool:
    return str(value).lower() in _ON


def _obstacles(wanted: Parallelism, values: Mapping[str, Any], environ: Mapping[str, str], *, is_launch: bool) -> list[UserError]:
    told = f"asks for {'FSDP' if wanted.kind == 'fsdp2' else 'ZeRO'}, which would not be applied"
    try:
        world_size = read_place(environ).world_size
    except UserError:  # which is told when the processes meet
        return []
    if world_size == 1 and is_launch:
        return [UserError(f"{told}: there is one process (orpo train --num_processes N starts more)", where=wanted.asked_by, mend=_MEND)]
    for name, reason in (("torch_compile", "it compiles the whole model"), ("fp16", "its scaler needs whole gradients")):
        if values.get(name):
            return [UserError(f"is not supported together with {wanted.kind}: {reason}", where=name, mend="leave it out")]
    return zero_obstacles(values, wanted.asked_by, is_launch=is_launch) if wanted.zero else []


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """As accelerate reads its variables."""
    return environ.get(name, "").lower() in _ON


@contextmanager
def accelerate_left_out() -> Iterator[None]:
    """accelerate hears nothing of FSDP and DeepSpeed while the context lasts: it would apply it in its own way, or on a CPU not at all."""
    hidden = {name: os.environ.pop(name) for name in _MASKED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
