"""Small real runs of `ORPOTrainer`, to be killed, signalled and resumed by tests in other processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.types import TokenGroup, Where


def import_all() -> None:
    """What a run imports, and what transformers makes at the first save of a process, once for all forks."""
    import importlib.util
    import tempfile

    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import orpo.training.trainer  # noqa: F401
    from tinymodels import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model("llama", num_layers=1).save_pretrained(folder)
    if importlib.util.find_spec("deepspeed"):  # seconds at every start
        import deepspeed  # noqa: F401


def mark(text: str) -> None:
    """Say where this process is, in its log and in the file of its own that tests wait for and read steps from.

    The log alone would not do: a signal's handler writes there too, between a line and its end. One write is one line.
    """
    print(text, flush=True)
    descriptor = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{text}\n".encode())
    finally:
        os.close(descriptor)


def groups(number: int, *, seed: int = 0, vocab_size: int = 128) -> list[TokenGroup]:
    """Random pairs of uneven length."""
    chance = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return chance.integers(3, vocab_size, size=chance.integers(low, high)).astype(np.int32)

    return [TokenGroup(ids(2, 9), (ids(2, 12), ids(2, 12)), ((0, 1),), (True, True), Where("data.jsonl", row)) for row in range(number)]


def train(
    run_dir: str,
    *,
    engine: str = "padded",
    lora: bool = False,
    kill_at: int | None = None,
    kill_after: str | None = None,
    slow_eval_s: float = 0.0,
    slow_save_s: float = 0.0,
    slow_publish_s: float = 0.0,
    slow_rows_s: float = 0.0,
    trouble: str | None = None,
    trouble_rank: int | None = None,
    anew: bool = False,
    tells_stages: bool = False,
    push_at_end: bool = False,
    num_rows: int = 22,
    options: dict[str, Any] | None = None,
) -> None:
    """Train to the end, resuming if there is something to resume; writes `final.json` with the sha256 of every trained weight.

    Args:
        run_dir: the run's folder.
        engine, lora: what to train with.
        kill_at: SIGKILL this process at its n-th file operation (see `die_at`).
        kill_after: SIGKILL it as soon as something has been renamed to this (`checkpoint-6`).
        slow_eval_s, slow_save_s, slow_publish_s, slow_rows_s: time to add to each evaluated micro-batch, before each file is synced, after
            each renaming, and to each row that is prepared, so that a signal hits there.
        trouble: something to go wrong in the model, a key of `TROUBLES`.
        trouble_rank: the rank that has the trouble; None for all.
        anew: do not resume.
        tells_stages: mark when loading, training, saving and publishing begin and a save is over, not the steps alone.
        push_at_end: call `push_to_hub()` after training, as scripts do.
        num_rows: training rows; 22 rows in steps of 4 leave a ragged tail.
        options: more fields of ORPOConfig.
    """
    from orpo import ORPOConfig, ORPOTrainer
    from orpo.checkpoint import find_newest
    from orpo.training.guards import SignalGuard
    from tinymodels import build_tiny_model, build_tiny_tokenizer

    if kill_at is not None:
        die_at(kill_at)
    if kill_after is not None:
        die_after(kill_after)
    if slow_save_s or tells_stages:
        _slow("sync_file", "saving", slow_save_s)
    if slow_publish_s or tells_stages:
        _slow("rename", "publishing", slow_publish_s)
    defaults: dict[str, Any] = {
        "max_steps": 14, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3, "logging_steps": 2,
        "eval_steps": 4, "eval_strategy": "steps", "save_total_limit": 2, "learning_rate": 3e-3, "warmup_steps": 2, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 11,
        **({"ddp_timeout": 15} if "WORLD_SIZE" in os.environ else {}),
    }  # fmt: skip
    args = ORPOConfig(output_dir=run_dir, engine=engine, **{**defaults, **(options or {})})
    with SignalGuard():  # as the command line does
        trainer = ORPOTrainer(
            model=build_tiny_model("llama", num_layers=2),
            args=args,
            train_dataset=_slow_rows(num_rows, slow_rows_s),
            eval_dataset=groups(5, seed=1),
            processing_class=build_tiny_tokenizer(),
            peft_config=_lora() if lora else None,
        )
        if slow_eval_s:
            _slow_evaluation(trainer, slow_eval_s)
        if trouble is not None and trouble_rank in (None, trainer.ranks.rank):
            TROUBLES[trouble](trainer)
        _tell_steps(trainer, tells_stages=tells_stages)
        is_resumed = find_newest(run_dir) is not None and not anew
        if is_resumed and tells_stages:
            mark("loading")
        trainer.train(resume_from_checkpoint=True if is_resumed else None)
        if push_at_end:
            trainer.push_to_hub()
    found = digests(trainer)  # of a sharded run by all ranks together
    if trainer.ranks.is_first:
        (Path(run_dir) / "final.json").write_text(json.dumps(found))


def leave_at_the_start() -> None:
    """Rank 1 is gone before the ranks have agreed on what to do."""
    from orpo.system.group import agree, join

    join(use_cpu=True, backend=None, timeout_s=15.0)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    agree({"seed": 1})


def digests(trainer: Any) -> dict[str, str]:
    """sha256 of each weight and of the optimizer state, which a run that was complete at its start does not load."""
    if trainer.zero is not None:
        found = {name: _sha(weight) for name, weight in trainer.zero.weights()}
        return found | {f"optimizer {name} {key}": _sha(value) for name, key, value in trainer.zero.moments()}
    found = {name: _sha(tensor) for name, tensor in trainer.model.state_dict().items()}
    for index, state in enumerate(trainer.optimizer.state_dict()["state"].values() if trainer.optimizer is not None else []):
        found |= {f"optimizer {index} {key}": _sha(value) for key, value in state.items()}
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock says."""
    clock = ("time", "runtime", "per_second")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not any(word in key for word in clock)} for line in lines]


def _sha(tensor: Any) -> str:
    from orpo.engine.parallel import gathered

    return hashlib.sha256(gathered(tensor).detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")


def die_at(number: int) -> None:
    """Kill this process with SIGKILL at its n-th operation of the checkpoint's file seam, or of the writing of weights and state."""
    import safetensors.torch

    from orpo.system import files as fs

    counter = 0

    def counted(real: Callable[..., Any], *, halfway: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal counter
            counter += 1
            if counter != number:
                return real(*arguments, **keywords)
            if halfway:  # the file is cut in the middle
                path = Path(arguments[1])
                real(*arguments, **keywords)
                os.truncate(path, path.stat().st_size // 2)
            return os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("make_dir", "write_file", "sync_file", "sync_dir", "rename", "unlink", "remove_dir"):
        setattr(fs, name, counted(getattr(fs, name), halfway=False))
    safetensors.torch.save_file = counted(safetensors.torch.save_file, halfway=True)


def die_after(name: str) -> None:
    """Kill this process with SIGKILL right after a rename to a name."""
    from orpo.system import files as fs

    real = fs.rename

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    fs.rename = rename


def _slow(operation: str, text: str, seconds: float) -> None:
    """Mark each call of a file operation, and wait before and after it."""
    from orpo.system import files as fs

    real = getattr(fs, operation)

    def call(*arguments: Any) -> None:
        mark(text)
        time.sleep(seconds)
        real(*arguments)
        if operation == "rename":
            time.sleep(seconds)

    setattr(fs, operation, call)


def _slow_evaluation(trainer: Any, seconds: float) -> None:
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_prediction_step(self, *arguments: Any, **keywords: Any) -> None:
            mark("evaluating")
            time.sleep(seconds)

    trainer.add_callback(Slow())


def _slow_rows(number: int, seconds: float) -> list[TokenGroup]:
    for _ in range(number if seconds else 0):
        mark("preparing")
        time.sleep(seconds)
    return groups(number)


def _from_step_5(trainer: Any, act: Callable[[Any], None]) -> None:
    from transformers import TrainerCallback

    class FromStep5(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step + 1 >= 5:
                act(model)

    trainer.add_callback(FromStep5())


def _nan_weight(trainer: Any) -> None:
    from orpo.engine.parallel import own_part

    def act(model: Any) -> None:
        own_part(model.model.norm.weight.data)[0] = float("nan")

    _from_step_5(trainer, act)


def _inf_gradient(trainer: Any) -> None:
    """The loss stays finite, one gradient does not."""
    is_on = []
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * float("inf") if is_on else grad)
    _from_step_5(trainer, lambda model: is_on.append(True))


def _one_inf_gradient(trainer: Any) -> None:
    """As `_inf_gradient`, in the fifth and sixth step alone."""
    num_seen: list[int] = []
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * float("inf") if 0 < len(num_seen) <= 2 else grad)
    _from_step_5(trainer, lambda model: num_seen.append(1))


def _frozen(trainer: Any) -> None:
    trainer.model.requires_grad_(False)


def _no_gradient(trainer: Any) -> None:
    for weight in trainer.model.parameters():
        weight.register_hook(lambda grad: grad * 0)


def _half_forgotten(trainer: Any) -> None:
    """The optimizer has only half of the trainable weights."""
    import torch

    names = [weight for name, weight in trainer.model.named_parameters() if "mlp" not in name]
    trainer.optimizer = torch.optim.AdamW(names, lr=3e-3)


def _exception(trainer: Any) -> None:
    def act(model: Any) -> None:
        raise ArithmeticError("the trouble of this rank alone")

    _from_step_5(trainer, act)


def _full_disk(trainer: Any) -> None:
    """What this rank saves finds no room, from the second save on."""
    import errno

    import orpo.training.saving as module

    real = module.save_rng

    def save_rng(folder: Path, *, rank: int) -> None:
        if trainer.state.global_step > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        real(folder, rank=rank)

    module.save_rng = save_rng


def _cannot_publish(trainer: Any) -> None:
    """This rank may make no name in the run's folder final."""
    from orpo.system import files as fs

    def refuse(*arguments: Any) -> None:
        raise AssertionError("only rank 0 publishes")

    fs.rename = fs.write_file = refuse


def _late(trainer: Any) -> None:
    """This rank writes its part of a checkpoint late."""
    import orpo.training.saving as module

    real = module.save_rng

    def save_rng(folder: Path, *, rank: int) -> None:
        time.sleep(0.3)
        assert not (folder.parents[1] / f"checkpoint-{trainer.state.global_step}").exists(), "published before all had written"
        real(folder, rank=rank)

    module.save_rng = save_rng


def _tracker_down(trainer: Any) -> None:
    """A tracker as those that come with transformers, whose server is gone."""
    from transformers import TrainerCallback

    class GoneCallback(TrainerCallback):
        def on_log(self, *arguments: Any, **keywords: Any) -> None:
            raise ConnectionError("no route to the tracker")

    GoneCallback.__module__ = "transformers.integrations.gone"
    trainer.add_callback(GoneCallback())


def _own_callback_fails(trainer: Any) -> None:
    from transformers import TrainerCallback

    class OwnCallback(TrainerCallback):
        def on_log(self, *arguments: Any, **keywords: Any) -> None:
            raise ConnectionError("of the user's own callback")

    trainer.add_callback(OwnCallback())


def _recorded_hub(trainer: Any) -> None:
    """A hub that takes everything, and writes down the names."""
    import concurrent.futures
    import fnmatch

    from huggingface_hub import HfApi

    def upload_folder(self: HfApi, *, folder_path: Path, allow_patterns: list[str], run_as_future: bool, **keywords: Any) -> Any:
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        sent = sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns))
        print("sent " + " ".join(sent), flush=True)
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        future.set_result(None)
        return future if run_as_future else None

    HfApi.upload_folder = upload_folder
    trainer.hub_model_id = "me/model"


TROUBLES = {
    "nan weight": _nan_weight,
    "inf gradient": _inf_gradient,
    "inf gradient twice": _one_inf_gradient,
    "frozen": _frozen,
    "no gradient": _no_gradient,
    "half forgotten": _half_forgotten,
    "exception": _exception,
    "tracker down": _tracker_down,
    "own callback fails": _own_callback_fails,
    "recorded hub": _recorded_hub,
    "full disk": _full_disk,
    "cannot publish": _cannot_publish,
    "late": _late,
}


def _tell_steps(trainer: Any, *, tells_stages: bool) -> None:
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *arguments: Any, **keywords: Any) -> None:
            mark(f"step {state.global_step}")

        def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
            mark("train end")

    class TellStages(Tell):
        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            mark("training")

        def on_save(self, *arguments: Any, **keywords: Any) -> None:
            mark("saved")

    trainer.add_callback(TellStages() if tells_stages else Tell())
