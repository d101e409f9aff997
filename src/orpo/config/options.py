"""`ORPOConfig`: every option of a training run that is not the model or the data source, and every check on them.

`TrainingArguments` accepts `learning_rate=-1`, ignores what it does not know how to use, raises on the first problem it meets and on
`bf16=True` without a GPU. Here all problems are told at once, each with the value found and the mend, and a configuration with nothing
set runs anywhere.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import time
import typing
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from orpo.config import compat, objectives
from orpo.config.checks import check_values
from orpo.config.parallelism import Parallelism, accelerate_left_out, parallelism_of
from orpo.config.values import did_you_mean
from orpo.errors import UserError, UserErrors
from orpo.system import group
from orpo.system.plugins import load_plugins

LOGITS_BYTES = (256 * 2**20, 2 * 2**30)
"""Least and most for vocabulary-sized tensors where nobody says: on a CPU small chunks cost nothing, a GPU wants thousands of rows."""
LOGITS_SHARE_OF_A_GPU = 1 / 40

CUDA_MICROBATCH_TOKENS, CPU_MICROBATCH_TOKENS = 16_384, 2_048

# Options in which the processes of one run may differ: what they say and where to, how each fetches its rows.
_OWN_TO_A_PROCESS = frozenset(
    {"local_rank", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "hub_token"}
    | {
        "push_to_hub",
        "dataset_num_proc",
        "token_cache",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
    }
)


class _NotGiven(float):
    """λ as nobody gave it: its default, or its value read back under TRL's name.

    `HfArgumentParser` and `dataclasses.replace` hand every field to the constructor, and only what a user gave may contradict.
    """


@dataclass
class ORPOConfig(TrainingArguments):
    """Options of an ORPO run, on top of `transformers.TrainingArguments`.

    The loss is `mean over tokens of NLL + orpo_alpha * mean over pairs of -log sigmoid(orpo_beta * log OR)`, both means over the whole
    optimizer step. Source of the defaults: ORPO (arXiv 2403.07691), 7B settings. Models below 1B need `orpo_alpha` near 1 and a
    learning rate near 5e-5 before the odds-ratio term shows.

    Raises:
        UserErrors: on creation, listing every value that cannot be right.

    Example:
        >>> from orpo import ORPOConfig
        >>> config = ORPOConfig(orpo_alpha=0.2)
        >>> config.beta, config.orpo_beta, config.max_length
        (0.2, 1.0, 1024)
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *(*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "column_map", "objective_options")
    ]

    output_dir: str | None = field(default=None, metadata={"help": "The run's folder. Unset: a fresh one under runs/."})
    learning_rate: float = field(default=8e-6, metadata={"help": "Peak learning rate. The paper's for 7B; small models need more."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps, or below 1 this share of the run."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in the log. Off: they are shown."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Unused: rows are read once, into token groups."})
    gradient_checkpointing: bool | str = field(
        default=False, metadata={"help": "Recompute activations: less memory, slower, same result. auto: of as few layers as fit."}
    )
    memory_budget_gib: float | None = field(
        default=None, metadata={"help": "Memory that gradient_checkpointing: auto may fill, in GiB. Unset: most of what is free."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16. Unset: where the device is fast at it."})

    objective: str = field(default="orpo", metadata={"help": "What is optimised: orpo, sft, simpo, or one that a plugin brings."})
    objective_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of other objectives than orpo, by key; each may be given by its own name instead."}
    )
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Python files and modules that register objectives or evaluation tasks. Their code is run."}
    )
    orpo_alpha: float = field(default=_NotGiven(0.1), metadata={"help": "Lambda: weight of the odds-ratio term."})
    beta: float | None = field(default=None, metadata={"help": "TRL's name for orpo_alpha."})
    orpo_beta: float = field(default=1.0, metadata={"help": "Temperature inside the odds-ratio term; 1 is the paper's form."})
    nll_scope: Literal["sequence", "response"] = field(
        default="sequence", metadata={"help": "Next-token loss over prompt and chosen answer (paper, TRL), or over the answer alone."}
    )
    engine: Literal["auto", "shared", "padded"] = field(
        default="auto", metadata={"help": "How log-probabilities are computed: prompts shared and packed, or plain padded rows."}
    )
    attention_kernel: Literal["auto", "sdpa", "flex", "varlen"] = field(
        default="auto", metadata={"help": "What computes attention over packed rows. auto: the fastest that was measured on such a device."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Most tokens of a prompt with one answer; null: the model's limit."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Most tokens of a prompt."})
    truncation: Literal["drop", "keep_end", "keep_start"] = field(
        default="drop", metadata={"help": "A prompt that does not fit: drop the row, or keep the prompt's end or start."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "null: the tokenizer's own; chatml; none (plain text); a file; or the template itself."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables for the chat template, such as {enable_thinking: false}; a row's own go before."},
    )
    special_tokens_in_text: Literal["warn", "split"] = field(
        default="warn", metadata={"help": "Special-token text inside a row: count and warn, or tokenise it as plain text."}
    )
    column_map: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Our column names to the data's: {prompt: question, chosen: good, rejected: bad}."}
    )
    pairs: str = field(default="best_worst", metadata={"help": "Which pairs to take from a row with more than two answers."})
    sft_rows: bool = field(default=False, metadata={"help": "Take rows with one answer as SFT-only rows."})
    strict_data: bool = field(default=False, metadata={"help": "Stop at the first row that cannot be used instead of dropping it."})
    allow_overlap: bool = field(default=False, metadata={"help": "Allow prompts that are in both training and evaluation data."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the rows. Unset: this one."})
    streaming: bool = field(
        default=False, metadata={"help": "Train from a source that is never read to its end, by windows; needs max_steps."}
    )
    stream_window: int = field(default=10_000, metadata={"help": "Rows of a window: what a stream is shuffled inside of."})
    token_cache: str | None = field(
        default="auto",
        metadata={"help": "Where tokenised rows are kept: auto (large sets, in the datasets library's cache), none, or a folder."},
    )

    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of a mixture of experts' auxiliary loss. Unset: what its configuration asks for; 0: none."}
    )
    logits_budget_mb: int | None = field(
        default=None, metadata={"help": "Most MiB that vocabulary-sized tensors may take at once. Unset: by the device's memory."}
    )
    max_tokens_per_microbatch: int | None = field(
        default=None, metadata={"help": "Most packed tokens of a micro-batch; changes no result. Unset: by device."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout; turning it on breaks batch invariance."})
    bf16_weights: bool | None = field(
        default=None, metadata={"help": "Trainable weights in bfloat16 with a float32 master in the optimizer step. Unset: chosen."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the learning rate of an adapter's B matrices, in learning rates (16)."}
    )
    on_nonfinite: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "At a non-finite loss or gradient: stop before the optimizer step, or skip that step."}
    )
    max_nonfinite_skips: int = field(default=3, metadata={"help": "Most steps that may be skipped before the run stops anyway."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End the run once metric_for_best_model has not improved in so many evaluations. Unset: never."}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "Least change of that metric that counts as better."})
    allow_changed_resume: bool = field(
        default=False, metadata={"help": "Resume although configuration or data changed; the result is then neither run's."}
    )

    parallelism: Literal["auto", "ddp", "fsdp2", "zero2", "zero3"] = field(
        default="auto", metadata={"help": "Several processes: each with the whole model (ddp), or weights spread over them. auto: ddp."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading a model that is given by name."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code from the model's repository; needs a revision."})

    max_completion_length: int | None = field(default=None, metadata={"help": "TRL's; encoder-decoder models only; no effect."})
    padding_value: int | None = field(default=None, metadata={"help": "TRL's; padding is masked by position; no effect."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "TRL's; encoder-decoder models are refused."})
    generate_during_eval: bool = field(default=False, metadata={"help": "TRL's; refused: use `orpo eval` on a checkpoint."})

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise UserErrors(problems, title=f"The configuration has {len(problems)} problem{'s' if len(problems) > 1 else ''}:")
        for name, note in compat.ignored({item.name: getattr(self, item.name) for item in fields(self)}):
            warnings.warn(note, UserWarning, stacklevel=4)
            setattr(self, name, compat.BY_NAME[name].harmless[0])  # so that transformers' Trainer does not act on it either
        if self.early_stopping_patience is not None and self.__dict__["metric_for_best_model"] is None:
            self.__dict__["metric_for_best_model"] = "loss"  # or transformers would leave open in which direction better lies
        output_dir, bf16, fp16 = self.output_dir, self.bf16, bool(self.__dict__["fp16"])
        if self.__dict__["report_to"] is None:  # YAML's null, or `--report_to none`; transformers would look for a tracker called None
            self.__dict__["report_to"] = "none"
        if getattr(self.save_strategy, "value", self.save_strategy) == "best" and self.__dict__["metric_for_best_model"] is None:
            # As transformers does for load_best_model_at_end; without one it would raise later.
            self.__dict__["metric_for_best_model"] = "loss"
        # transformers 5.2x renamed the field and warns about the old name, which is the one everybody's scripts use.
        is_auto = self.gradient_checkpointing == "auto"
        if is_auto or getattr(self, "activation_checkpointing", False) is None:
            # By need it is done here (`orpo.training.recompute`), and transformers is not to do it as well.
            self.activation_checkpointing = self.gradient_checkpointing = False if is_auto else self.gradient_checkpointing
        # TrainingArguments raises on bf16 without a GPU, and makes accelerate wrap the forward in autocast. The dtype is the engine's
        # business here, so it never sees the flags.
        self.bf16 = self.fp16 = False
        # Without use_cpu accelerate would let every process of a machine without accelerator train alone.
        use_cpu = bool(self.__dict__["use_cpu"])
        self.__dict__["use_cpu"] = group.join(
            use_cpu=use_cpu or _accelerate_wants_cpu(), backend=self.ddp_backend, timeout_s=self.ddp_timeout
        )
        if self.__dict__["use_cpu"]:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, warns that it finds nothing else
        try:
            with self.fsdp_hidden():
                super().__post_init__()
        except ValueError as error:
            raise UserError(str(error), where="configuration") from error
        group.require_group(self.world_size)
        self.bf16, self.fp16 = bf16, fp16
        self.torch_compile = bool(self.__dict__["torch_compile"] or self.torch_compile_backend or self.torch_compile_mode)
        self.__dict__["use_cpu"] = use_cpu  # as the user has it: what a resumed run is compared with
        self.gradient_checkpointing = "auto" if is_auto else bool(getattr(self, "activation_checkpointing", self.gradient_checkpointing))
        # TrainingArguments would name a folder all runs share; None means a fresh one, made when training starts.
        self.output_dir = os.path.expanduser(output_dir) if output_dir is not None else None

    @property
    def compute_dtype(self) -> str:
        """`"bfloat16"`, `"float16"` or `"float32"`: the dtype of matrix products. The objective is float32 whatever this says."""
        if self.fp16:
            return "float16"
        if self.bf16 is None:
            from orpo.system.machine import bf16_is_fast

            return "bfloat16" if bf16_is_fast(self.device) else "float32"
        return "bfloat16" if self.bf16 else "float32"

    @property
    def spread(self) -> Parallelism:
        """How weights are spread over the processes, whichever option or launcher asked for it."""
        return parallelism_of({item.name: getattr(self, item.name) for item in fields(self)}, os.environ)

    @contextmanager
    def fsdp_hidden(self) -> Iterator[None]:
        """Neither transformers nor accelerate hears of FSDP, DeepSpeed or compiling while the context lasts: `orpo.engine` applies them."""
        names = ("fsdp", "fsdp_config", "deepspeed", "torch_compile", "torch_compile_backend", "torch_compile_mode")
        given = {name: self.__dict__[name] for name in names}
        self.__dict__.update(dict.fromkeys(names), torch_compile=False)
        try:
            with accelerate_left_out():
                yield
        finally:
            self.__dict__.update(given)

    @property
    def microbatch_tokens(self) -> int:
        """Most packed tokens of a micro-batch: `max_tokens_per_microbatch`, or what suits the device."""
        if self.max_tokens_per_microbatch is not None:
            return self.max_tokens_per_microbatch
        return CUDA_MICROBATCH_TOKENS if self.device.type == "cuda" else CPU_MICROBATCH_TOKENS

    @property
    def logits_budget_bytes(self) -> int:
        """Most bytes of vocabulary-sized tensors: `logits_budget_mb`, or what suits the device."""
        if self.logits_budget_mb is not None:
            return self.logits_budget_mb * 2**20
        from orpo.system.machine import memory_facts

        return default_logits_bytes((memory_facts(self.device)["total_bytes"] or 0) if self.device.type == "cuda" else 0)

    def ensure_output_dir(self) -> str:
        """The run's folder; a fresh name under `runs/`, the same on all ranks, where none was given. Creates nothing.

        Collective: with several processes all of them must call it, and all must have the same options.

        Raises:
            UserError: the processes differ in an option.
        """
        group.agree({name: value for name, value in self.to_dict().items() if name not in _OWN_TO_A_PROCESS})
        if self.output_dir is None:
            chosen = [fresh_run_dir()]
            if self.world_size > 1:
                from accelerate.utils import broadcast_object_list

                broadcast_object_list(chosen, from_process=0)
            self.output_dir = chosen[0]
        return self.output_dir

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; λ once, under its own name."""
        values = super().to_dict()
        values.pop("beta", None)
        return values

    def __getattr__(self, name: str) -> Any:
        """An option of an objective that is no field here: as given, or its default."""
        # Looked at only for names that are nowhere else; the dunders that copy and pickle ask for are no options.
        option = None if name.startswith("_") else objectives.option_keys().get(name)
        if option is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        given = self.__dict__.get("objective_options")
        return given.get(name, option.default) if isinstance(given, dict) else option.default

    def problems(self) -> list[UserError]:
        """Every value that cannot be right, each with where, what was expected and the mend; empty if all is well."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return check_values(values, field_types())


def default_logits_bytes(gpu_bytes: int) -> int:
    """For vocabulary-sized tensors on a GPU of so much memory; 0: on no GPU."""
    return min(max(round(gpu_bytes * LOGITS_SHARE_OF_A_GPU), LOGITS_BYTES[0]), LOGITS_BYTES[1])


def _accelerate_wants_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this, which transformers obeys too."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes", "y", "on", "t")


def fresh_run_dir(root: str = "runs") -> str:
    """A folder name nobody has used: the time to sort by, eight random characters against two starts in one second."""
    return os.path.join(root, f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}")


@functools.cache
def field_types() -> dict[str, Any]:
    """Field name -> type annotation, for every field of `ORPOConfig`."""
    hints = typing.get_type_hints(ORPOConfig)
    hints["resume_from_checkpoint"] = bool | str | None  # as transformers' own train() takes it
    hints["fsdp"] = bool | str | None  # as transformers' own flag, which may stand alone, and `fsdp: true`
    return {item.name: hints[item.name] for item in fields(ORPOConfig) if item.init}


def field_defaults() -> dict[str, Any]:
    """Field name -> default, for every field of `ORPOConfig`."""
    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(ORPOConfig) if item.init
    }


_newest: deque[ORPOConfig] = deque(maxlen=1)


def newest_config() -> ORPOConfig | None:
    """The configuration that was made last: a script's own, for `orpo.run.scripts`, whose flags are declared here."""
    return _newest[0] if _newest else None


def _read_beta(config: ORPOConfig) -> float:
    return _NotGiven(config.orpo_alpha)


def _write_beta(config: ORPOConfig, value: float | None) -> None:
    if value is not None:
        config.orpo_alpha = value


def _gather_objective_options(options: dict[str, Any], problems: list[UserError]) -> list[str]:
    """Options of objectives that were given by their own names, into `objective_options`; a note for each that has no effect."""
    nested = options.get("objective_options")
    if isinstance(nested, str):  # from a command line
        try:
            nested = options["objective_options"] = json.loads(nested)
        except ValueError as error:
            problems.append(UserError(f"found {nested!r} ({error})", where="objective_options", expected='{"simpo_gamma": 1.0}'))
            nested = options["objective_options"] = None
    own = {name: options.pop(name) for name in list(options) if name in objectives.option_keys() and name not in field_types()}
    if own:
        options["objective_options"] = {**(nested or {}), **own}
    # A parser hands every field over, so that a default is no sign of a wish.
    fields_given = [name for name in options if name in objectives.option_keys() and options[name] != field_defaults()[name]]
    return objectives.options_without_effect(options.get("objective", "orpo"), [*(nested or {}), *own, *fields_given])


_dataclass_init = ORPOConfig.__init__


@functools.wraps(_dataclass_init)
def _init_with_compat(self: ORPOConfig, *args: Any, **kwargs: Any) -> None:
    """Creation through the compatibility table: TRL's names are mapped, unknown ones answered with the nearest known."""
    if isinstance(kwargs.get("beta"), _NotGiven):
        del kwargs["beta"]
    if kwargs.get("beta") is not None and isinstance(kwargs.get("orpo_alpha"), _NotGiven):
        del kwargs["orpo_alpha"]
    load_plugins(kwargs.get("plugins"))
    options, problems, notes = compat.translate(kwargs)
    notes += compat.unlike_trl(kwargs)
    known = field_types()
    notes += _gather_objective_options(options, problems)
    for name in [name for name in options if name not in known]:
        del options[name]
        mend = did_you_mean(name, [*known, *objectives.option_keys()])
        problems.append(UserError(f"ORPOConfig has no option {name!r}", where=name, mend=mend))
    if problems:
        problems += check_values({**field_defaults(), **options}, known)
        raise UserErrors(problems, title=f"The configuration has {len(problems)} problem{'s' if len(problems) > 1 else ''}:")
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    _dataclass_init(self, *args, **options)
    _newest.append(self)


# One number under two names. A plain pair of fields would drift apart as soon as one of them is assigned.
ORPOConfig.__init__ = _init_with_compat  # type: ignore[method-assign]
ORPOConfig.beta = property(_read_beta, _write_beta)  # type: ignore[assignment]
