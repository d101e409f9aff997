"""Short real runs of `ORPOTrainer` on a tiny model, for tests; a module, so that ranks started by a test do the very same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from orpo import ORPOConfig, ORPOTrainer
from orpo.data.types import TokenGroup
from orpo.engine.parallel import gathered, is_shard, is_sharded
from randomgroups import random_groups
from tinymodels import build_tiny_model, build_tiny_tokenizer

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
STEADY: dict[str, Any] = {
    "bf16": False,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "orpo_alpha": 1.0,
    "seed": 7,
}
"""float32, and a rate at which thirty steps move a tiny model."""


def make_config(output_dir: Any, **options: Any) -> ORPOConfig:
    """A quiet float32 configuration; batch 2 x 2 unless told otherwise."""
    defaults = {**QUIET, **STEADY, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    return ORPOConfig(output_dir=str(output_dir), **{**defaults, **options})


def make_trainer(
    output_dir: Any, groups: Sequence[TokenGroup], *, model: Any = None, arguments: dict[str, Any] | None = None, **options: Any
) -> ORPOTrainer:
    """A trainer of a tiny Llama (or `model`) on token groups. `arguments` go to the trainer, the rest to its configuration."""
    return ORPOTrainer(
        model=build_tiny_model("llama", num_layers=2) if model is None else model,
        args=make_config(output_dir, **options),
        train_dataset=list(groups),
        **{"processing_class": build_tiny_tokenizer(), **(arguments or {})},
    )


def logged(trainer: ORPOTrainer, name: str = "loss") -> list[float]:
    """A metric at every log of training."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights; of a sharded model all ranks call it."""
    return {name: gathered(parameter).clone() for name, parameter in model.named_parameters()}


def assert_same_trajectory(found: Sequence[float], expected: Sequence[float], *, largest: float = 1e-5, mean: float = 1e-6) -> None:
    """Relative differences of losses, step by step: the largest, and the mean with its sign (a drift that noise would hide)."""
    assert len(found) == len(expected)
    differences = (torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)) / torch.tensor(expected)
    assert differences.abs().max() <= largest, differences
    assert differences.mean().abs() <= mean, differences.mean()


def train_and_report(
    output_dir: str,
    *,
    num_rows: int = 13,
    lora: bool = False,
    architecture: str = "llama",
    resume: bool = False,
    half: bool = False,
    by_name: bool = False,
    per_machine: int | None = None,
    **options: Any,
) -> None:
    """A run of one or more ranks: every rank leaves its weights, rank 0 the logs and an evaluation, for a test to compare.

    With `by_name` the trainer loads the model itself, from a folder. `per_machine` ranks are told that they share a
    machine.
    """
    import os
    from pathlib import Path

    from peft import LoraConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    arguments: dict[str, Any] = {"processing_class": build_tiny_tokenizer()}
    arguments |= {"eval_dataset": {"a": random_groups(7, seed=1, kinds=("pair", "sft")), "b": random_groups(1, seed=2)}}
    if lora:
        arguments["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = random_groups(num_rows, kinds=("pair", "pair", "four", "sft", "partial", "pair"))
    model: Any = build_tiny_model(architecture, num_layers=3 if architecture == "gemma3" else 2)
    if half:
        model.to(torch.bfloat16)
    if per_machine is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_machine)
    if by_name:
        folder = Path(output_dir) / f"start-{os.environ.get('RANK', '0')}"
        model.save_pretrained(folder)
        arguments["processing_class"].save_pretrained(folder)
        model = str(folder)
    trainer = make_trainer(output_dir, rows, model=model, arguments=arguments, **options)
    trainer.train(resume_from_checkpoint=True if resume else None)
    evaluation = trainer.evaluate()
    rank = trainer.args.process_index
    save_file(
        {name: weight.contiguous() for name, weight in weights(trainer.model).items()}, Path(output_dir) / f"weights-{rank}.safetensors"
    )
    if rank == 0:
        report = {
            "log": trainer.state.log_history,
            "evaluation": evaluation,
            "engine": trainer.engine.name,
            "steps": trainer.state.global_step,
            "is_sharded": is_sharded(trainer.model),
        }
        (Path(output_dir) / "report.json").write_text(json.dumps(report))


def leave_a_layer_out_and_report(output_dir: str, **options: Any) -> None:
    """A run whose steps after the first leave one layer's MLP out: moved.json says how far its weights went after that."""
    from pathlib import Path

    from transformers import TrainerCallback

    name = "model.layers.1.mlp.up_proj.weight"

    class LeaveOut(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1:
                seen.append(weights(trainer.model)[name])
                trainer.model.model.layers[1].mlp.forward = lambda x: 0 * x

    torch.manual_seed(0)
    seen: list[torch.Tensor] = []
    trainer = make_trainer(output_dir, random_groups(13), engine="padded", optim="sgd", max_steps=3, **options)
    first = build_tiny_model("llama", num_layers=2).get_parameter(name)
    trainer.add_callback(LeaveOut())
    trainer.train()
    last = weights(trainer.model)[name]
    if trainer.args.process_index == 0:
        moved = {"before": float((seen[0] - first).norm()), "after": float((last - seen[0]).norm())}
        (Path(output_dir) / "moved.json").write_text(json.dumps(moved))


def held_by_a_run(output_dir: str, flags: list[str]) -> None:
    """What memory a run's process came to hold above what it held before its model was loaded, as `orpo train` loads and trains it.

    Every rank leaves held-RANK.json: `start`, memory of its own until training begins, without pages of the model's file (those are the
    page cache's, one copy for all, and given back when room is needed), `moments`, when
    and how much of it until the weights are spread; `training`, all that is resident, from there to the end.
    """
    import threading
    import time
    from pathlib import Path

    from transformers import TrainerCallback

    from orpo.run.config import resolve
    from orpo.run.data import prepare_data
    from orpo.training.runner import build_trainer
    from orpo.training.startmodel import load_run_model

    def held(name: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) * 1024

    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            samples.append(held("RssAnon:"))
            moments.append(time.monotonic())
            time.sleep(0.02)

    class Begin(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            is_over.set()
            found["start, resident"] = held("VmHWM:") - floor
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    config = resolve(None, [f"--output_dir={output_dir}", *flags])
    args = config.training_args()
    data = prepare_data(config, args, lambda line: None)
    samples, floor = [held("RssAnon:")], held("VmRSS:")
    moments: list[float] = []
    found: dict[str, Any] = {}
    Path("/proc/self/clear_refs").write_text("5")
    thread = threading.Thread(target=watch)
    thread.start()
    trainer = build_trainer(config, args, data, load_run_model(config, args, data).model, [Begin()])
    spread, create_optimizer = trainer.spread_weights, trainer.create_optimizer

    def are_spread() -> None:
        found.setdefault("moments", [[moment, held - samples[0]] for moment, held in zip(moments, samples[1:], strict=False)])

    def spread_weights(checkpoint: str | None) -> None:
        spread(checkpoint)
        are_spread()

    def create() -> Any:
        are_spread()  # by ZeRO-3, before DeepSpeed makes room for what it trains with
        return create_optimizer()

    trainer.spread_weights, trainer.create_optimizer = spread_weights, create  # type: ignore[method-assign]
    trainer.train()
    thread.join()
    found |= {"start": max(samples) - samples[0], "training": held("VmHWM:") - floor, "is_sharded": is_sharded(trainer.model)}
    (Path(output_dir) / f"held-{args.process_index}.json").write_text(json.dumps(found))


def num_tied(model: torch.nn.Module) -> int:
    """Names of weights that are another one's too."""
    return len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.named_parameters()))


def send_and_report(output_dir: str, flags: list[str], *, wrong: str | None = None, trains: bool = True) -> None:
    """A run whose weights come from rank 0, as `orpo train` loads, spreads and trains it.

    Every rank leaves sent-RANK.json: how many weights it had values of before they were sent, the most bytes that lay whole on it then,
    its buffers, and the engine. Rank 0 leaves the weights that training starts from.
    """
    from pathlib import Path

    from safetensors.torch import save_file

    from orpo.engine import sending, shared
    from orpo.run.config import resolve
    from orpo.run.data import prepare_data
    from orpo.training.runner import build_trainer
    from orpo.training.startmodel import load_run_model

    def whole_bytes() -> int:
        """Of weights that lie here whole."""
        whole = [one for one in trainer.model.parameters() if not one.is_meta and not is_shard(one)]
        return sum(one.numel() * one.element_size() for one in whole)

    def bring(sender: Any, module: torch.nn.Module) -> None:
        before(sender, module)
        seen.append(whole_bytes())

    def wrong_step(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        return replace(result, logp_N=result.logp_N + 0.01) if wrong == "values" else replace(result, loss=1.1 * result.loss)

    config = resolve(None, [f"--output_dir={output_dir}", *flags])
    args = config.training_args()
    data = prepare_data(config, args, lambda line: None)
    trainer = build_trainer(config, args, data, load_run_model(config, args, data).model, [])
    found: dict[str, Any] = {"real": sum(not weight.is_meta for weight in trainer.model.parameters())}
    seen: list[int] = []
    before, step = sending.Sender.bring, shared.step
    sending.Sender.bring = bring  # type: ignore[method-assign]
    if wrong is not None:
        shared.step = wrong_step
    found |= {"engine": trainer.engine.name, "reason": trainer.engine.reason, "whole": max(seen)}
    core = trainer.accelerator.unwrap_model(trainer.model)
    found["tied"] = num_tied(core)
    found["gradients"] = sum(weight.grad is not None for weight in core.parameters())
    found["buffers"] = {name: buffer.flatten().tolist() for name, buffer in core.named_buffers()}
    started = weights(trainer.model)
    if args.process_index == 0:
        save_file({name: weight.contiguous() for name, weight in started.items()}, Path(output_dir) / "started.safetensors")
    if trains:
        found["loss"] = trainer.train().training_loss
    (Path(output_dir) / f"sent-{args.process_index}.json").write_text(json.dumps(found))


def stream_and_report(output_dir: str, rows: str, *, stop_at: int | None = None, resume: bool = False, **options: Any) -> None:
    """As `train_and_report`, from a file that is streamed; `stop_at` ends it as a kill would, behind a checkpoint."""
    import os
    from pathlib import Path

    from safetensors.torch import save_file
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                os._exit(9)

    torch.manual_seed(0)
    config = make_config(output_dir, **{"streaming": True, "max_length": 200, "save_strategy": "steps", "save_steps": 2, **options})
    trainer = ORPOTrainer(
        model=build_tiny_model("llama", vocab_size=384, num_layers=2),
        args=config,
        train_dataset=rows,
        processing_class=build_tiny_tokenizer(),
        callbacks=[Kill()],
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    rank = trainer.args.process_index
    save_file(
        {name: weight.contiguous() for name, weight in weights(trainer.model).items()}, Path(output_dir) / f"weights-{rank}.safetensors"
    )
    if rank == 0:
        found = {"log": trainer.state.log_history, "rows": trainer.train_report.to_dict(), "steps": trainer.state.global_step}
        (Path(output_dir) / "report.json").write_text(json.dumps(found))
