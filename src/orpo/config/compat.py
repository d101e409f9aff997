"""The one table of TRL's, older TRL's and transformers' option names: accepted, mapped, ignored or refused, and why.

`ORPOConfig`, the YAML reader and the flags all go through it, `docs/trl-compatibility.md` is printed from it
(`python -m orpo.config.compat`), and a test holds it against the installed TRL, so that no option of theirs is an unknown key here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from orpo.errors import UserError

Status = Literal["accepted", "mapped", "ignored", "refused"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What becomes of one option.

    Attributes:
        source: where the name comes from ("ORPOConfig", "ScriptArguments", "ModelConfig", "older names", "TrainingArguments").
        status: accepted as it is; mapped to another option; ignored with a note; refused unless the value is one of `harmless`.
        note: the difference to TRL, or the reason.
        to: the option that a mapped name means.
        convert: how a mapped value is translated.
        harmless: values that an ignored or refused option may have without a word, or functions that tell them; the first is a value.
        mend: what to use instead of a refused option.
    """

    name: str
    source: str
    status: Status
    note: str
    to: str | None = None
    convert: Callable[[Any], Any] | None = None
    harmless: tuple[Any, ...] = ()
    mend: str | None = None


def _accepted(source: str, rows: dict[str, str]) -> list[Entry]:
    return [Entry(name, source, "accepted", note) for name, note in rows.items()]


def _evaluation_sampling(value: Any) -> Any:
    return "group_by_length" if value else "random"


def _is_usual_accelerator_config(value: Any) -> bool:
    """Whether it is what transformers makes of nothing, which a copy of a configuration hands back."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    given = value.to_dict() if isinstance(value, AcceleratorConfig) else value
    return isinstance(given, dict) and given.items() <= AcceleratorConfig().to_dict().items()


TRL_ORPO_CONFIG = [
    *_accepted(
        "ORPOConfig",
        {
            "learning_rate": "default 8e-6, the paper's for 7B (TRL: 1e-6)",
            "max_length": "same default, 1024; `null` means the model's own limit",
            "disable_dropout": "same; turned on, the run says what no longer holds",
            "model_init_kwargs": "same",
            "trust_remote_code": "needs `model_revision` (a commit or tag) as well",
            "logging_steps": "same default, 10",
            "gradient_checkpointing": "default off (TRL: on); changes memory and speed, not results",
            "bf16": "unset: on where the device is fast at it (TRL: on everywhere, and raises without a GPU)",
            "lr_scheduler_kwargs": "same",
            "torch_empty_cache_steps": "same",
        },
    ),
    Entry("beta", "ORPOConfig", "mapped", "TRL's name for λ; it reads and writes the same number", to="orpo_alpha"),
    Entry(
        "max_completion_length",
        "ORPOConfig",
        "ignored",
        "TRL uses it for encoder-decoder models alone; an answer's length is bounded by max_length",
        harmless=(None,),
    ),
    Entry("padding_value", "ORPOConfig", "ignored", "padding is masked by position, so its id cannot matter", harmless=(None,)),
    Entry("dataset_num_proc", "ORPOConfig", "accepted", "processes that tokenise the rows, once for all ranks of a machine"),
    Entry(
        "generate_during_eval",
        "ORPOConfig",
        "refused",
        "it logs generations to a tracker in the middle of a run",
        harmless=(None, False),
        mend="`orpo eval` generates from any checkpoint of a run",
    ),
    Entry(
        "is_encoder_decoder",
        "ORPOConfig",
        "refused",
        "encoder-decoder models are not supported",
        harmless=(None, False),
        mend="use a decoder-only model",
    ),
    Entry(
        "use_liger_kernel",
        "ORPOConfig",
        "refused",
        "it replaces layers that the engine relies on; the loss without a full logits tensor is built in",
        harmless=(None, False),
        mend="leave it out; logits_budget_mb bounds the memory of the loss",
    ),
]

TRL_SCRIPT_ARGUMENTS = [
    *_accepted(
        "ScriptArguments",
        {
            "dataset_name": "hub id, folder or files (json, jsonl, csv, parquet, arrow, .gz); several as a list",
            "dataset_config": "same",
            "dataset_train_split": "default: train, or the only split there is (TRL: train)",
            "dataset_test_split": "default: none; name it to evaluate (TRL: test), or use eval_fraction",
            "dataset_streaming": "read without a copy on disk, tokenised before the first step all the same; see `streaming`",
        },
    ),
    Entry("ignore_bias_buffers", "ScriptArguments", "ignored", "the optimizer step synchronises gradients, not buffers", harmless=(False,)),
]

TRL_MODEL_CONFIG = [
    *_accepted(
        "ModelConfig",
        {
            "model_name_or_path": "hub id, folder, GGUF file, or the alias smollm2-135m-instruct",
            "model_revision": "same",
            "dtype": "dtype of the frozen weights; trainable ones are float32, or bfloat16 with a float32 master",
            "use_peft": "same; implied by load_in_4bit and load_in_8bit",
            "lora_r": "same default, 16",
            "lora_alpha": "same default, 32",
            "lora_dropout": "default 0 (TRL: 0.05): dropout breaks batch invariance",
            "lora_target_modules": "default: all linear layers",
            "lora_target_parameters": "same",
            "lora_modules_to_save": "same",
            "use_rslora": "same",
            "use_dora": "same",
            "load_in_8bit": "needs bitsandbytes; on a CPU it saves memory and no time",
            "load_in_4bit": "needs bitsandbytes; on a CPU it saves memory and no time",
            "bnb_4bit_quant_type": "same",
            "use_bnb_nested_quant": "same",
            "bnb_4bit_quant_storage": "same",
        },
    ),
    Entry(
        "attn_implementation",
        "ModelConfig",
        "ignored",
        "the engine brings its own attention (see `engine`); the padded one runs under sdpa",
        harmless=(None, "sdpa"),
    ),
    Entry(
        "lora_task_type",
        "ModelConfig",
        "refused",
        "only causal language models are trained",
        harmless=(None, "CAUSAL_LM"),
        mend="leave it out",
    ),
]

_OLD = "older names"
OLDER_NAMES = [
    Entry("max_prompt_length", _OLD, "accepted", "older TRL's; a bound on the prompt alone"),
    Entry("truncation_mode", _OLD, "mapped", "older TRL's; the same values", to="truncation"),
    Entry("max_target_length", _OLD, "mapped", "older TRL's", to="max_completion_length"),
    Entry("label_pad_token_id", _OLD, "ignored", "there are no padded labels", harmless=(None, -100)),
    Entry("tokenizer", _OLD, "accepted", "an argument of the trainer, the same as processing_class"),
    Entry("model_name", _OLD, "mapped", "", to="model_name_or_path"),
    Entry("torch_dtype", _OLD, "mapped", "", to="dtype"),
    Entry("dataset_num_workers", _OLD, "mapped", "", to="dataset_num_proc"),
    Entry("evaluation_strategy", _OLD, "mapped", "renamed in transformers 4.41", to="eval_strategy"),
    Entry("warmup_ratio", _OLD, "mapped", "transformers 5: a warmup_steps below 1 is a share of all steps", to="warmup_steps"),
    Entry("no_cuda", _OLD, "mapped", "", to="use_cpu"),
    Entry("per_gpu_train_batch_size", _OLD, "mapped", "", to="per_device_train_batch_size"),
    Entry("per_gpu_eval_batch_size", _OLD, "mapped", "", to="per_device_eval_batch_size"),
    Entry("push_to_hub_model_id", _OLD, "mapped", "", to="hub_model_id"),
    Entry("push_to_hub_token", _OLD, "mapped", "", to="hub_token"),
    Entry("group_by_length", _OLD, "mapped", "", to="train_sampling_strategy", convert=_evaluation_sampling),
    Entry("overwrite_output_dir", _OLD, "ignored", "a folder that holds a run is resumed; name another to start afresh", harmless=(False,)),
    Entry("logging_dir", _OLD, "ignored", "logs are metrics.jsonl in the run's folder", harmless=(None,)),
    Entry("use_mps_device", _OLD, "ignored", "the device is chosen by itself", harmless=(False,)),
    Entry("save_safetensors", _OLD, "refused", "weights are always saved as safetensors", harmless=(None, True), mend="leave it out"),
    Entry("local_rank", _OLD, "accepted", "set by the launcher"),
]

_TA = "TrainingArguments"
INHERITED = [
    Entry(
        "label_smoothing_factor",
        _TA,
        "refused",
        "the objective has no label smoothing",
        harmless=(0, None),
        mend="leave it out",
    ),
    Entry(
        "auto_find_batch_size",
        _TA,
        "refused",
        "a batch size found by trial makes the update depend on the machine",
        harmless=(False, None),
        mend="max_tokens_per_microbatch bounds the memory of a micro-batch and changes no result",
    ),
    Entry(
        "neftune_noise_alpha",
        _TA,
        "refused",
        "its noise depends on the length of the batch, which packing changes",
        harmless=(None, 0),
        mend="leave it out",
    ),
    Entry(
        "torch_compile",
        _TA,
        "accepted",
        "compiles each decoder layer, packed attention included, after a trial beside the layers as they are; TRL compiles the model",
    ),
    Entry(
        "train_sampling_strategy",
        _TA,
        "refused",
        "the order of rows is a seeded shuffle per epoch; packing needs no grouping by length",
        harmless=("random", None),
        mend="leave it out; data_seed changes the order",
    ),
    Entry(
        "ignore_data_skip",
        _TA,
        "refused",
        "a resumed run would train rows twice",
        harmless=(False, None),
        mend="leave it out; resuming needs no time to skip rows",
    ),
    Entry("bf16_full_eval", _TA, "ignored", "evaluation computes in the dtype of training", harmless=(False,)),
    Entry("fp16_full_eval", _TA, "ignored", "evaluation computes in the dtype of training", harmless=(False,)),
    Entry("include_num_input_tokens_seen", _TA, "ignored", "tokens are always counted", harmless=("no", False)),
    Entry("dataloader_drop_last", _TA, "ignored", "the ragged tail of an epoch is trained, as a smaller step", harmless=(False,)),
    Entry("dataloader_num_workers", _TA, "ignored", "rows are tokenised once and stay in memory", harmless=(0,)),
    Entry("dataloader_prefetch_factor", _TA, "ignored", "rows are tokenised once and stay in memory", harmless=(None,)),
    Entry("dataloader_persistent_workers", _TA, "ignored", "rows are tokenised once and stay in memory", harmless=(False,)),
    Entry(
        "average_tokens_across_devices",
        _TA,
        "ignored",
        "the loss is always normalised over the tokens of all devices",
        harmless=(True,),
    ),
    Entry("dataloader_pin_memory", _TA, "ignored", "rows are tokenised once and stay in memory", harmless=(True, False)),
    Entry("dataloader_multiprocessing_context", _TA, "ignored", "no process loads data", harmless=(None,)),
    Entry("dataloader_in_order", _TA, "ignored", "rows always come in the sampler's order", harmless=(True,)),
    Entry("length_column_name", _TA, "ignored", "nothing is grouped by length", harmless=("length",)),
    Entry("label_names", _TA, "ignored", "rows are read into token groups, which have no labels", harmless=(None, [])),
    *(
        Entry(name, _TA, "ignored", "an evaluation keeps exact sums, never the model's outputs", harmless=harmless)
        for name, harmless in (
            ("prediction_loss_only", (False, True)),
            ("eval_do_concat_batches", (True,)),
            ("eval_use_gather_object", (False,)),
            ("eval_accumulation_steps", (None,)),
            ("include_for_metrics", ([],)),
            ("batch_eval_metrics", (False,)),
        )
    ),
    Entry(
        "accelerator_config",
        _TA,
        "ignored",
        "order, splitting and accumulation of batches are the step's own",
        harmless=(None, {}, _is_usual_accelerator_config),
    ),
    Entry("liger_kernel_config", _TA, "ignored", "use_liger_kernel is refused, and with it what it would do", harmless=(None, {})),
    Entry("enable_jit_checkpoint", _TA, "ignored", "SIGTERM always saves a checkpoint", harmless=(False,)),
    Entry("remove_unused_columns", _TA, "ignored", "rows are read once, into token groups", harmless=(False, True)),
    Entry("use_cache", _TA, "ignored", "training keeps no cache, and generation always does", harmless=(False,)),
    Entry("logging_nan_inf_filter", _TA, "accepted", "default off: a non-finite loss is shown, and stops the run"),
    Entry("lr_scheduler_type", _TA, "accepted", "default cosine (there: linear)"),
    Entry("warmup_steps", _TA, "accepted", "default 0.1, a tenth of the steps (there: none)"),
]

TABLE: tuple[Entry, ...] = tuple(TRL_ORPO_CONFIG + TRL_SCRIPT_ARGUMENTS + TRL_MODEL_CONFIG + OLDER_NAMES + INHERITED)
BY_NAME: dict[str, Entry] = {entry.name: entry for entry in TABLE}


def translate(options: dict[str, Any]) -> tuple[dict[str, Any], list[UserError], list[str]]:
    """Put options into today's names.

    Args:
        options: name -> value as the user gave them.

    Returns:
        The options under the names of `ORPOConfig` and the run configuration; a problem for each pair of names that mean one thing and
        disagree, and for each refused name that no field stands for; a note for each ignored one.
    """
    result = {name: value for name, value in options.items() if not _is_only_a_name(name)}
    problems: list[UserError] = []
    notes: list[str] = []
    for name, value in options.items():
        entry = BY_NAME.get(name)
        if entry is None or not _is_only_a_name(name):
            continue
        if entry.status == "mapped" and entry.to is not None:
            if value is None:
                continue
            new = entry.convert(value) if entry.convert else value
            if entry.to in result and result[entry.to] != new:
                problems.append(
                    UserError(
                        f"found {value!r}, while {entry.to} is {result[entry.to]!r}, and they are two names for one thing",
                        where=name,
                        mend=f"keep {entry.to}",
                    )
                )
            else:
                result[entry.to] = new
        elif entry.status == "refused":
            problems += _refusal(entry, value)
        else:
            notes += _note(entry, value)
    return result, problems, notes


def unlike_trl(options: Iterable[str]) -> list[str]:
    """What computes another thing here than in TRL although no option says so, for options that are written in TRL's words; else empty.

    Told where `beta` is given, which is TRL's name alone, and the schedule is left to its default.
    """
    names = set(options)
    if "beta" not in names or names & {"lr_scheduler_type", "warmup_steps", "warmup_ratio"}:
        return []
    return [
        "beta is TRL's name for orpo_alpha; unlike in TRL the rate follows a cosine after a tenth of warm-up (TRL's: lr_scheduler_type "
        "linear, warmup_steps 0), and prompts and answers given as text become chat turns where the tokenizer has a template "
        "(chat_template none leaves them plain). docs/guides/from-trl.md lists what differs"
    ]


def _is_only_a_name(name: str) -> bool:
    """Whether no field of ours has this name, so that it must be translated away."""
    entry = BY_NAME.get(name)
    if entry is None:
        return False
    return entry.status == "mapped" or (entry.source == _OLD and entry.status in ("ignored", "refused"))


def _is_harmless(entry: Entry, value: Any) -> bool:
    value = getattr(value, "value", value)
    return any(
        harmless(value) if callable(harmless) else value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
        for harmless in entry.harmless
    )


def _refusal(entry: Entry, value: Any) -> list[UserError]:
    if _is_harmless(entry, value):
        return []
    return [UserError(f"{getattr(value, 'value', value)!r} is refused: {entry.note}", where=entry.name, mend=entry.mend)]


def _note(entry: Entry, value: Any) -> list[str]:
    return [] if _is_harmless(entry, value) else [f"{entry.name} has no effect: {entry.note}"]


def refusals(values: dict[str, Any]) -> list[UserError]:
    """A problem for each refused option whose value is not harmless."""
    return [
        problem
        for name, value in values.items()
        if name in BY_NAME and BY_NAME[name].status == "refused"
        for problem in _refusal(BY_NAME[name], value)
    ]


def ignored(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, note) for each option that was set and has no effect."""
    return [
        (name, note)
        for name, value in values.items()
        if name in BY_NAME and BY_NAME[name].status == "ignored"
        for note in _note(BY_NAME[name], value)
    ]


_TITLES = {
    "ORPOConfig": "ORPOConfig",
    "ScriptArguments": "ScriptArguments",
    "ModelConfig": "ModelConfig",
    _OLD: "Names from older versions of TRL and transformers",
    _TA: "TrainingArguments: where the behaviour differs",
}


def _rows(entries: Iterable[Entry]) -> list[str]:
    rows = []
    for entry in entries:
        status = f"mapped to `{entry.to}`" if entry.status == "mapped" else entry.status
        note = entry.note + (f"; {entry.mend}" if entry.mend else "")
        rows.append(f"| `{entry.name}` | {status} | {note} |")
    return rows


def render() -> str:
    """The table as a Markdown page."""
    lines = [
        "# Coming from TRL",
        "",
        "A script written for TRL's `ORPOTrainer` runs with only its import changed, and a YAML file for `trl` runs with `orpo train`.",
        "This page lists what becomes of each option that TRL 1.16 defines or overrides, of names from older versions, and of those",
        "options of `TrainingArguments` that behave differently here. All others of `TrainingArguments` mean what they mean there.",
        "",
        "- *accepted*: same name, same meaning, differences noted",
        "- *mapped*: another name for one of our options; giving both with different values is an error",
        "- *ignored*: has no effect, and the run says so when it is set",
        "- *refused*: stops before anything is loaded, with the reason, unless it is set to what we do anyway",
        "",
        "What differs although no option says so (schedule, BOS, plain text, ends of answers): [moving from TRL](guides/from-trl.md).",
        "",
        "This page is printed by `python -m orpo.config.compat`.",
    ]
    for source, title in _TITLES.items():
        entries = [entry for entry in TABLE if entry.source == source]
        lines += ["", f"## {title}", "", "| option | | note |", "|---|---|---|", *_rows(entries)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
