"""Configurations drawn from the keys that there are, with values that a person might give them and values that nobody would."""

from __future__ import annotations

import typing
from typing import Any

from hypothesis import strategies as st

from orpo.config.checks import EVALUATED
from orpo.config.values import members
from orpo.run.keys import key_types

NOT_DRAWN = frozenset(
    {"model_name_or_path", "dataset_name", "output_dir", "use_cpu", "max_steps"}  # what makes it a small run in its own folder
    | {"torch_compile", "torch_compile_backend", "torch_compile_mode"}  # minutes of a C compiler
    | {"push_to_hub", "hub_token", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}  # they speak to the outside
    | {"full_determinism", "ddp_timeout", "dpo_beta"}  # the process's own; hours of waiting; only comparisons have it
)

LIKELY: dict[str, list[Any]] = {
    "optim": [
        *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "lion_32bit"),
        *("galore_adamw", "galore_adafactor_layerwise", "lomo", "apollo_adamw", "schedule_free_adamw", "adamw_torch_4bit", "ademamix"),
        *("stable_adamw", "grokadamw", "adamw_anyprecision", "adamw_torch_xla", "adamw_torch_npu_fused", "rmsprop_bnb_32bit"),
    ],
    "optim_args": ["", "rank=4", "momentum=0.9", "nesterov=true", "beta1=0.8", "scale_parameter=False", "x", "fused=1,eps=1e-6"],
    "optim_target_modules": ["all-linear", "q_proj", ["attn", "mlp"], ["nothing"]],
    "lr_scheduler_type": [
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "greedy"),
        *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "cosin"),
    ],
    "lr_scheduler_kwargs": [{}, {"min_lr": 1e-7}, {"min_lr_rate": 0.1}, {"num_cycles": 2}, {"num_decay_steps": 1}, {"power": 2.0}, "x"],
    "eval_strategy": ["no", "steps", "epoch", "never"],
    "save_strategy": ["no", "steps", "epoch", "best"],
    "logging_strategy": ["no", "steps", "epoch"],
    "hub_strategy": ["end", "every_save", "checkpoint", "all_checkpoints"],
    "metric_for_best_model": [*EVALUATED, "eval_loss", "accuracy", "eval_runtime"],
    "report_to": ["none", "all", "tensorboard", "wandb", "mlflow", "azure_ml", ["tensorboard", "none"], "file", []],
    "train_sampling_strategy": ["random", "sequential", "group_by_length", "longest"],
    "objective": ["orpo", "sft", "simpo", "dpo", "kto"],
    "pairs": ["best_worst", "all", "adjacent", "random", "first"],
    "chat_template": ["chatml", "none", "{{ messages }}", "{% for", "nothing.jinja"],
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"messages": 1}, "x"],
    "column_map": [{}, {"prompt": "prompt"}, {"prompt": "question"}, {"chosen": "rejected", "rejected": "chosen"}, "x"],
    "dataset_train_split": ["train", "test", "train[:8]", "train[:50%]", "train[:2]"],
    "dataset_test_split": ["test", "train", "train[80%:]"],
    "token_cache": ["auto", "none"],
    "stream_window": [1, 7, 100],
    "eval_fraction": [0.1, 0.25, 0.5, 0.01, 0.99, 0.0, 2],
    "lora_target_modules": ["all-linear", ["q_proj"], ["q_proj", "v_proj"], ["lm_head"], ["nothing"], ".*proj", ["embed_tokens"]],
    "lora_target_parameters": [["mlp.experts.gate_up_proj"], ["nothing"], []],
    "lora_modules_to_save": [["lm_head"], ["embed_tokens"], ["nothing"], []],
    "lora_task_type": ["CAUSAL_LM", "SEQ_CLS"],
    "bnb_4bit_quant_storage": ["uint8", "float32", "x"],
    "attn_implementation": ["eager", "sdpa", "flash_attention_2"],
    "model_init_kwargs": [{}, {"attn_implementation": "eager"}, {"dtype": "bfloat16"}, {"nothing": 1}, {"device_map": "auto"}, "x"],
    "model_revision": ["main", "abc"],
    "gradient_checkpointing_kwargs": [{}, {"use_reentrant": False}, {"use_reentrant": True}, {"nothing": 1}, "x"],
    "activation_checkpointing_kwargs": [{}, {"use_reentrant": False}, {"nothing": 1}],
    "accelerator_config": [{}, {"split_batches": True}, {"nothing": 1}, {"dispatch_batches": True}, "x.json", {"even_batches": False}],
    "deepspeed": ["x.json", {"zero_optimization": {"stage": 2}}],
    "fsdp": ["full_shard", "full_shard auto_wrap", "x", True, ""],
    "fsdp_config": [{}, {"min_num_params": 1}, {"nothing": 1}, "x.json", {"fsdp_version": 2}],
    "ddp_backend": ["gloo", "nccl", "x"],
    "debug": ["", "underflow_overflow", "x"],
    "log_level": ["passive", "debug", "info", "error", "loud"],
    "log_level_replica": ["warning", "loud"],
    "logging_steps": [1, 0.5, 10, 0.01, 1.5],
    "save_steps": [1, 2, 0.5, 500, 1.5],
    "eval_steps": [1, 3, 0.5, 1.5, 100],
    "warmup_steps": [0, 0.1, 1, 10, 0.999],
    "learning_rate": [1e-6, 5e-5, 1e-3, 5.0, 1e-30],
    "per_device_train_batch_size": [1, 2, 3, 12, 64],
    "gradient_accumulation_steps": [1, 2, 5, 50],
    "per_device_eval_batch_size": [1, 3, 64],
    "num_train_epochs": [1, 0.5, 3.0, 0.001],
    "max_length": [8, 24, 64, 512, 513, 8192, None],
    "max_prompt_length": [1, 8, 64, 511],
    "logits_budget_mb": [1, 256],
    "attention_kernel": ["auto", "sdpa", "flex", "varlen", "flash"],
    "max_tokens_per_microbatch": [1, 16, 200, 2048],
    "dataloader_num_workers": [0, 1],
    "dataloader_prefetch_factor": [1, 2],
    "dataloader_multiprocessing_context": ["fork", "spawn", "x"],
    "lora_r": [1, 4, 64],
    "lora_alpha": [1, 32],
    "lora_dropout": [0.0, 0.1, 0.9],
    "neftune_noise_alpha": [5.0, 0.0],
    "label_smoothing_factor": [0.0, 0.1],
    "plugins": [["nothing.py"], ["json"], []],
    "resume_from_checkpoint": ["true", True, "checkpoint-1", "nothing"],
    "run_name": ["my run", "a/b"],
    "simpo_beta": [2.0, 0.0],
    "simpo_gamma": [0.5, -1.0, 20.0],
    "eval_dataset_name": ["rows.jsonl", "nothing.jsonl", ["rows.jsonl"]],
    "dataset_config": ["default"],
    "include_num_input_tokens_seen": ["no", "all", "non_padding", True, "x"],
    "label_names": [["labels"], []],
    "include_for_metrics": [["inputs"], ["loss"], ["x"]],
    "save_total_limit": [1, 2, 5],
    "eval_accumulation_steps": [1, 4],
    "torch_empty_cache_steps": [1, 2],
    "parallelism": ["auto", "ddp", "fsdp2", "zero2", "zero3"],
    "liger_kernel_config": [{}, {"rope": True}],
    "seed": [0, 1, 2**32 - 1],
    "data_seed": [0, 7],
    "weight_decay": [0.0, 0.1, 1.0],
    "adam_beta1": [0.0, 0.9, 1.0],
    "adam_beta2": [0.0, 0.95, 1.0],
    "adam_epsilon": [1e-8, 1.0],
    "max_grad_norm": [0, 1, 1e-9],
    "orpo_alpha": [0, 0.1, 1.0, 100.0],
    "orpo_beta": [0.1, 1.0, 5.0],
}
"""What people write for a key, right and wrong."""

NONSENSE = st.sampled_from(
    [None, "", "x", "true", "none", -1, 0, 1, 7, 1.5, -0.5, 1e30, float("nan"), True, [], ["x"], {}, {"x": 1}, "1e-3"]
)
"""Values for any key at all."""


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Right values of a type, where the table has none."""
    choices: list[Any] = [choice for member in members(hint) for choice in typing.get_args(member) if isinstance(choice, str)]
    if bool in members(hint) or hint is bool:
        choices += [True, False]
    if int in members(hint) or float in members(hint) or hint in (int, float):
        choices += [0, 1, 2]
    return st.sampled_from(choices) if choices else NONSENSE


def _value(key: str, hint: Any) -> st.SearchStrategy[Any]:
    likely = st.sampled_from(LIKELY[key]) if key in LIKELY else _of_type(hint)
    return st.integers(0, 11).flatmap(lambda chance: NONSENSE if chance == 11 else likely)


QUANTIZED = ("tiny-4bit", "tiny-8bit", "tiny.gguf")
"""Bases that are stored quantized and load on a CPU."""
PACKED = ("gptq", "awq", "fp8", "mxfp4", "torchao", "hqq", "quanto", "compressed-tensors", "aqlm", "nonsense")
"""Methods that a base's config.json may name; most need a package or a device that is not there."""
_BASES = ("tiny", *QUANTIZED, *(f"tiny-{method}" for method in PACKED))

_SWITCHES = ("use_peft", "eval_strategy", "save_strategy", "load_best_model_at_end", "optim", "lr_scheduler_type", "lora_target_modules")
"""On which the meaning of others depends: drawn more often than the rest."""


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Two to six keys of a run with a value each; one in four on a base that is stored in another way."""
    hints = {key: hint for key, hint in key_types().items() if key not in NOT_DRAWN}
    keys = draw(st.lists(st.sampled_from(sorted(hints)) | st.sampled_from(_SWITCHES), min_size=2, max_size=6, unique=True))
    given = {key: draw(_value(key, hints[key])) for key in keys}
    if draw(st.integers(0, 3)) == 3:
        given["model_name_or_path"] = draw(st.sampled_from(_BASES))
        if draw(st.booleans()):  # without an adapter every quantized base ends in one refusal
            given["use_peft"] = True
    return given
