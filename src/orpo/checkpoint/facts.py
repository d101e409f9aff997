"""Whether a resumed run is still the same run: the facts of the checkpoint against those of now."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from orpo.errors import CheckpointError

_ABSENT = "(absent)"

MAY_CHANGE = frozenset(
    {
        # Fields of TrainingArguments that change no weight: where things go, what is logged, how often is saved and evaluated.
        "output_dir", "run_name", "logging_dir", "logging_steps", "logging_first_step", "logging_strategy", "log_level",
        "log_level_replica", "log_on_each_node", "report_to", "project", "trackio_space_id", "disable_tqdm", "save_steps", "save_strategy",
        "save_total_limit", "eval_steps", "eval_strategy", "eval_on_start", "eval_delay", "per_device_eval_batch_size",
        "load_best_model_at_end", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push",
        "parallelism", "fsdp", "fsdp_config", "deepspeed",
        "hub_revision", "plugins", "resume_from_checkpoint", "overwrite_output_dir", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_timeout", "local_rank", "logits_budget_mb",
        "allow_changed_resume", "dataset_num_proc", "token_cache",
    }
)  # fmt: skip
"""Keys (last part of the dotted name) that may differ on resume without a word."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that is not what it was; `key` is dotted (`config.learning_rate`)."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"

    @property
    def is_new(self) -> bool:
        """The checkpoint does not have the key at all."""
        return self.old is _ABSENT

    @property
    def is_gone(self) -> bool:
        """The checkpoint has the key, and now there is none."""
        return self.new is _ABSENT


def compare_facts(old: Mapping[str, Any], new: Mapping[str, Any], *, may_change: Collection[str] = MAY_CHANGE) -> list[Difference]:
    """What differs between the facts in a checkpoint's manifest and those of the run that wants to resume from it, by dotted key."""
    flat_old, flat_new = flat(_as_json(old)), flat(_as_json(new))
    keys = [key for key in sorted({*flat_old, *flat_new}) if key not in may_change and key.rpartition(".")[2] not in may_change]
    pairs = [(key, flat_old.get(key, _ABSENT), flat_new.get(key, _ABSENT)) for key in keys]
    return [Difference(key, before, after) for key, before, after in pairs if (type(before), before) != (type(after), after)]


def require_same_facts(
    old: Mapping[str, Any], new: Mapping[str, Any], *, where: str, allow: bool = False, may_change: Collection[str] = MAY_CHANGE
) -> list[Difference]:
    """Refuse to resume a changed run.

    Args:
        old: facts of the checkpoint.
        new: facts of now.
        where: the checkpoint, for the message.
        allow: the user's explicit override; the differences are then returned and nothing is raised.
        may_change: keys that do not matter.

    Raises:
        CheckpointError: something differs; the message is the diff.
    """
    differences = compare_facts(old, new, may_change=may_change)
    if differences and not allow:
        refuse_differences(differences, where=where)
    return differences


def refuse_differences(differences: Sequence[Difference], *, where: str, note: str = "") -> NoReturn:
    """Refuse to resume.

    Args:
        differences: what differs.
        where: the checkpoint.
        note: versions that differ too, which may be why.

    Raises:
        CheckpointError: the message is the diff.
    """
    lines = "\n".join(f"    {difference}" for difference in differences) + (f"\n    versions: {note}" if note else "")
    raise CheckpointError(
        f"this run is not the one that wrote the checkpoint; what changed (checkpoint -> now):\n{lines}",
        where=where,
        mend="undo the change, use a new output_dir, or resume anyway with allow_changed_resume: true",
    )


def _as_json(facts: Mapping[str, Any]) -> Any:
    """As it comes back from a manifest: tuples are lists, keys are strings."""
    return json.loads(json.dumps(facts, allow_nan=False))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Facts by dotted key."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: item for name, inner in value.items() for key, item in flat(inner, f"{prefix}.{name}" if prefix else name).items()}


def _short(value: Any) -> str:
    text = value if value == _ABSENT else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
