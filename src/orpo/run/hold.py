"""A run's folder in the hands of one process group: the lock, the checkpoint to go on from, and whether it is of the same run.

with RunHold(folder, ranks=ranks) as hold:             # locked, and tidied up after whoever was here before
    hold.look_for(wanted, or_newest=True)              # hold.checkpoint, proved whole, or None
    hold.require_same(config=..., run=...)             # each fact is asked for once, as soon as it is known
    ...                                                # train, evaluate, write run.json
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orpo.checkpoint import (
    ALONE,
    MAY_CHANGE,
    Difference,
    Manifest,
    Ranks,
    RunLock,
    compare_facts,
    find_newest,
    is_verified,
    list_checkpoints,
    read_manifest,
    recover,
    refuse_differences,
    set_earlier_aside,
    verify,
)
from orpo.checkpoint.facts import flat
from orpo.errors import CheckpointError, UserError
from orpo.run.config import as_facts
from orpo.run.folder import COMPLETE, RunFolder, final_weights
from orpo.system.group import on_all
from orpo.system.machine import versions
from orpo.system.redact import redact

if TYPE_CHECKING:
    from orpo.config.options import ORPOConfig
    from orpo.run.config import RunConfig

logger = logging.getLogger(__name__)

OF_THE_RUN = (
    *("model_name_or_path", "model_revision", "model_init_kwargs", "dtype", "use_peft", "load_in_4bit", "load_in_8bit"),
    *("lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora"),
    "lora_init",
)
"""Keys of a run that are not options of the trainer and yet decide what is trained. Rows are compared by their content."""

FACTS = ("run", "config", "rows_per_step", "data", "engine", "compute_dtype", "objective_code")
"""What a resumed run must share with the one that saved; the part `run` is there where a configuration was run, not a script."""

NUMBER_OF_STEPS = frozenset({"max_steps", "num_train_epochs"})
"""Options that count through the learning rates of the steps that are done (`orpo.training.schedule`)."""

ROWS_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that count through `rows_per_step`: how a step is dealt to ranks and micro-batches changes rounding alone."""


class RunHold:
    """Exclusive hold on a run's folder, as a context manager; all ranks enter.

    Attributes:
        folder: the run's.
        checkpoint: what the run goes on from, proved whole; None where it starts anew, and before `look_for`.
        manifest: of that checkpoint.
        now: the facts that were compared so far, as a checkpoint of this run will keep them.

    Raises:
        UserError: another run holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path | str, *, ranks: Ranks = ALONE) -> None:
        self.folder = Path(folder)
        self.checkpoint: Path | None = None
        self.manifest: Manifest | None = None
        self.now: dict[str, Any] = {}
        self._ranks = ranks
        self._is_named = False
        self._lock = RunLock(folder, ranks=ranks)

    def __enter__(self) -> RunHold:
        self._lock.__enter__()
        try:
            # Before anything is looked for: the newest checkpoint may still have the name of one that was being replaced.
            recover(self.folder, ranks=self._ranks)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def look_for(self, wanted: str | Path | bool | None, *, or_newest: bool = False) -> Path | None:
        """Choose the checkpoint to go on from.

        Args:
            wanted: a folder; True or "true": the newest, which must be there; None: nothing; False or "false": to start anew.
            or_newest: for None, take the newest there is.

        Raises:
            CheckpointError: wanted, and not there, damaged, or not written by orpo.
        """
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as flags and scripts of transformers say it
            wanted = wanted.lower() == "true"
        if wanted in (None, "", False, True):
            self.checkpoint = find_newest(self.folder, ranks=self._ranks) if wanted or (wanted is None and or_newest) else None
            if self.checkpoint is None and wanted:
                mend = "start anew: leave resume_from_checkpoint out"
                raise CheckpointError("no checkpoint verifies", where=str(self.folder), mend=mend)
        else:
            self.checkpoint = Path(str(wanted)).expanduser()
        folder = self.checkpoint
        self.manifest = None if folder is None else on_all(lambda: _proved(folder, is_first=self._ranks.is_first))
        self._is_named = not isinstance(wanted, bool | None)
        return folder

    def make_room(self) -> None:
        """Set aside what must not stand beside the checkpoints to come. All ranks call it, once nothing speaks against going on.

        Without a checkpoint to go on from that is all of an earlier run; with one that was named, the run's own later ones: the next start
        would take the newest of them, whose lines of metrics.jsonl are no longer there.
        """
        if self._ranks.is_first:
            if self.manifest is None:
                set_earlier_aside(self.folder, with_files=[RunFolder(self.folder).metrics.path.name])
            elif self._is_named and self.checkpoint is not None and self.checkpoint.absolute().parent == self.folder.absolute():
                set_earlier_aside(self.folder, after_step=self.manifest.step)
        self._ranks.gather(None)

    def rows_per_step(self, args: ORPOConfig) -> int:
        """Rows of an optimizer step over all ranks: those of the run's first start, whatever the number of ranks is now.

        They are chosen anew only with `per_device_train_batch_size` and `gradient_accumulation_steps`, and then compared.
        """
        facts = {} if self.manifest is None else self.manifest.facts
        if facts.get("rows_per_step") and all(facts.get("config", {}).get(name) == getattr(args, name) for name in ROWS_OF_A_STEP):
            return int(facts["rows_per_step"])
        first = self._first_start()
        configured = [first.get("configuration", {}).get(name, {}).get("value") for name in ROWS_OF_A_STEP]
        if self.manifest is None and first.get("rows_per_step") and configured == [getattr(args, name) for name in ROWS_OF_A_STEP]:
            return int(first["rows_per_step"])
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def require_same(self, *, allow: bool, **now: Any) -> None:
        """Refuse to go on where a fact differs from the checkpoint's. Without a checkpoint the facts are only noted.

        Args:
            allow: go on all the same, with a warning for each difference (`allow_changed_resume`).
            now: facts, by their names in `FACTS`; one that was compared before is not compared again.

        Raises:
            CheckpointError: what differs, in one message, with the versions where they differ too.
        """
        new = {name: now[name] for name in FACTS if name in now and name not in self.now}
        self.now |= new
        if self.checkpoint is None or self.manifest is None or not new:
            return
        before = {name: self._before(name) for name in new}
        if before.get("run", True) is None:  # of a script, whose model nobody has written down
            del new["run"]
        has_same_rows = self.manifest.facts.get("rows_per_step") == self.now.get("rows_per_step")
        may_change = MAY_CHANGE | NUMBER_OF_STEPS | (set(ROWS_OF_A_STEP) if has_same_rows else set())
        differences = self._without_upgrades(compare_facts({name: before[name] for name in new}, new, may_change=may_change))
        if differences and not allow:
            refuse_differences(differences, where=str(self.checkpoint), note=self.other_versions())
        for difference in differences:
            logger.warning("resuming although this has changed: %s", difference)

    def other_versions(self) -> str:
        """`transformers 5.17.0 (now 5.23.0)`, for each version that is not the checkpoint's; empty where all are."""
        before, now = (self.manifest.versions if self.manifest else {}), versions()
        return ", ".join(
            f"{name} {old} (now {now[name]})" for name, old in before.items() if now.get(name, old) != old and name != "platform"
        )

    def _before(self, name: str) -> Any:
        assert self.manifest is not None and self.checkpoint is not None  # noqa: S101, PT018  (asked by `require_same`)
        known = self.manifest.facts.get(name)
        if known is not None or name != "run":
            return known
        # Checkpoints of version 0.1.0 do not have the part; the run that wrote them does.
        configuration = (RunFolder(self.checkpoint.parent).read() or {}).get("configuration")
        return configuration and {key: item["value"] for key, item in configuration.items() if key in OF_THE_RUN}

    def _first_start(self) -> dict[str, Any]:
        facts = RunFolder(self.folder).read() or {}
        return facts if facts.get("status") != COMPLETE else {}

    def _without_upgrades(self, differences: list[Difference]) -> list[Difference]:
        """Without options that only one of two versions has: a new one at its default, or one that is gone."""
        defaults = _defaults() if any(difference.is_new for difference in differences) else {}
        kept, gone = [], []
        for difference in differences:
            if difference.is_new and difference.new == defaults.get(difference.key, False):
                continue
            if difference.is_gone and self.other_versions():
                gone.append(difference.key.partition(".")[2])
                continue
            kept.append(difference)
        if gone:
            logger.warning("options of the checkpoint that this version does not have: %s", ", ".join(gone))
        return kept


def _defaults() -> dict[str, Any]:
    """What every option is where nobody sets it, as it comes out of this version's transformers, by dotted key."""
    from orpo.config.options import ORPOConfig
    from orpo.run.keys import key_defaults

    keys = key_defaults()
    return flat({"config": options_as_facts(ORPOConfig(output_dir="unused")), "run": {key: keys[key] for key in OF_THE_RUN}})


def is_complete(folder: RunFolder, config: RunConfig) -> bool:
    """Whether this very run is done; no, where it is to have more steps than it had.

    Raises:
        UserError: the folder holds a finished run of another configuration, or weights that no run.json tells of.
    """
    facts = folder.read()
    if facts is None:
        if list_checkpoints(folder.path) or final_weights(folder.path):
            raise UserError("holds weights but no run.json", where=str(folder.path), mend="choose another output_dir")
        return False
    if facts.get("status") != COMPLETE:
        return False
    old, new = (plain_values(values) for values in (facts.get("configuration", {}), redact(as_facts(config))))
    shared = old.keys() & new.keys()
    changed = compare_facts({key: old[key] for key in shared}, {key: new[key] for key in shared})
    others = [difference for difference in changed if difference.key not in NUMBER_OF_STEPS]
    if others:
        diff = "\n".join(f"    {difference}" for difference in others)
        raise UserError(f"holds a finished run of another configuration:\n{diff}", where=str(folder.path), mend="choose another output_dir")
    return not changed


def run_as_facts(config: RunConfig) -> Any:
    """The keys of a configuration that a checkpoint keeps beside the trainer's options."""
    values = plain_values(redact(as_facts(config)))
    return {key: values[key] for key in OF_THE_RUN}


def options_as_facts(args: ORPOConfig, **hidden: Any) -> Any:
    """The trainer's options as a checkpoint keeps them; `hidden` are those that have another value while it trains."""
    options = {**args.to_dict(), **hidden}
    for name in ("fsdp_config", "deepspeed"):  # how weights are spread over ranks changes rounding alone
        options.pop(name, None)
    return redact(json.loads(json.dumps(options, default=str)))


def _proved(folder: Path, *, is_first: bool) -> Manifest:
    """The manifest of a checkpoint whose every file was read by rank 0."""
    if not (folder / "manifest.json").exists():
        raise _foreign(folder)
    if not is_first:
        return read_manifest(folder)
    return read_manifest(folder) if is_verified(folder) else verify(folder)


def _foreign(folder: Path) -> CheckpointError:
    """Why a folder that somebody wants to go on from is no checkpoint of orpo, and what to do instead."""
    if not folder.is_dir():
        beside = list_checkpoints(folder.parent)
        return CheckpointError("there is no such folder", where=str(folder), mend=_name_one(beside))
    if inside := list_checkpoints(folder):
        return CheckpointError("is a run's folder, not a checkpoint", where=str(folder), mend=_name_one(inside))
    is_adapter = (folder / "adapter_config.json").is_file()
    if (is_adapter or (folder / "config.json").is_file()) and any(folder.glob("*.safetensors")):
        other = "weights alone" if not (folder / "trainer_state.json").is_file() else "a checkpoint of another trainer (transformers, TRL)"
        adapter = " and use_peft: false, which trains this adapter on" if is_adapter else ""
        return CheckpointError(
            f"is {other}: it has no manifest.json, and its optimizer's state cannot be used",
            where=str(folder),
            mend=f"start from its weights: leave resume_from_checkpoint out, and model_name_or_path: {folder}{adapter}",
        )
    return CheckpointError(
        "is not a checkpoint: it has no manifest.json",
        where=str(folder),
        expected="a folder checkpoint-<step> that orpo wrote",
        mend="start anew: leave resume_from_checkpoint out",
    )


def _name_one(checkpoints: Sequence[Path]) -> str:
    ours = [path for path in checkpoints if (path / "manifest.json").is_file()]
    found: Sequence[Path] = ours or checkpoints
    return f"resume_from_checkpoint: {found[0]}" if found else "start anew: leave resume_from_checkpoint out"


def plain_values(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """key -> value of a configuration as run.json has it (key -> value and origin)."""
    return {key: item.get("value") for key, item in configuration.items() if isinstance(item, dict)}
