"""On a GPU: short real runs. All ways to compute give one trajectory, a resumed run is the uninterrupted one, the host waits once a step,
and the memory is what the plan says. `make test-cuda` runs all of it, and `cudadevice.py` says how a CPU does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from cudadevice import CUDA_TESTS, DEVICE, compiler, kernels_here, only_on_a_gpu
from orpo import ORPOTrainer
from orpo.data.types import TokenGroup
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import assert_same_trajectory, logged, make_trainer, weights

pytestmark = CUDA_TESTS
STEPS = 30


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with kernels_here():
        yield


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    return random_groups(67, kinds=("pair", "pair", "four", "sft", "partial"), prompt=(2, 40), answer=(1, 30))


def trainer_of(folder: Path, groups: list[TokenGroup], **options: Any) -> ORPOTrainer:
    arguments = options.pop("arguments", None)
    model = build_tiny_model("llama", hidden_size=64, num_layers=2)
    defaults = {"use_cpu": DEVICE == "cpu", "per_device_train_batch_size": 4, "max_steps": STEPS}
    return make_trainer(folder, groups, model=model, arguments=arguments, **{**defaults, **options})


def losses(folder: Path, groups: list[TokenGroup], **options: Any) -> list[float]:
    trainer = trainer_of(folder, groups, **options)
    trainer.train()
    assert trainer.args.device.type == DEVICE
    return logged(trainer)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, groups: list[TokenGroup]) -> list[float]:
    """The padded engine in float32."""
    return losses(tmp_path_factory.mktemp("exact"), groups, engine="padded")


FP32 = {"sdpa": {}, "flex": {"attention_kernel": "flex"}, "checkpointing": {"gradient_checkpointing": True}, "cut": {"logits_budget_mb": 1}}


@pytest.mark.parametrize("name", FP32)
def test_thirty_steps_in_float32_are_one_trajectory(name: str, tmp_path: Path, groups: list[TokenGroup], exact: list[float]) -> None:
    """Kernels add up in another order than a CPU: 1e-4 at most, 1e-5 in the mean."""
    assert_same_trajectory(losses(tmp_path, groups, engine="shared", **FP32[name]), exact, largest=1e-4, mean=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "flex", "varlen"])
def test_thirty_steps_in_bf16_follow_it(kernel: str, tmp_path: Path, groups: list[TokenGroup], exact: list[float]) -> None:
    found = losses(tmp_path, groups, engine="shared", attention_kernel=kernel, bf16=True)
    assert_same_trajectory(found, exact, largest=5e-2, mean=5e-3)


@pytest.mark.parametrize("kernel", ["sdpa", "flex", "varlen"])
def test_thirty_steps_in_fp16_follow_it(kernel: str, tmp_path: Path, groups: list[TokenGroup], exact: list[float]) -> None:
    """With the scale of a run that skips no step."""
    found = losses(tmp_path, groups, engine="shared", attention_kernel=kernel, bf16=False, fp16=True)
    assert_same_trajectory(found, exact, largest=5e-2, mean=5e-3)


def test_an_adapter_follows_its_own_padded_run(tmp_path: Path, groups: list[TokenGroup]) -> None:
    from peft import LoraConfig

    def adapted(engine: str) -> list[float]:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return losses(tmp_path / engine, groups, engine=engine, max_steps=12, arguments={"peft_config": config})

    torch.manual_seed(0)
    expected = adapted("padded")
    torch.manual_seed(0)
    assert_same_trajectory(adapted("shared"), expected, largest=1e-4, mean=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_on_four_bit_weights_learns(tmp_path: Path, groups: list[TokenGroup]) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build_tiny_model("llama", hidden_size=64, num_layers=2).save_pretrained(tmp_path / "model")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantized, device_map={"": DEVICE})
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"use_cpu": DEVICE == "cpu", "bf16": True, "max_steps": 20, "learning_rate": 5e-3}
    trainer = make_trainer(tmp_path / "run", groups, model=model, arguments={"peft_config": config}, **options)
    trainer.train()
    assert trainer.engine.name == "shared"
    assert sum(logged(trainer)[-5:]) < sum(logged(trainer)[:5])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """Bit for bit, with kernels that add up in one order alone."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"engine": "shared", "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
            whole = trainer_of(tmp_path / "whole", groups, **options)
            whole.train()
            again = trainer_of(tmp_path / "whole", groups, **options)
            again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert logged(again) == logged(whole)
    for name, weight in weights(again.model).items():
        assert torch.equal(weight, weights(whole.model)[name]), name


class Waits(TrainerCallback):
    """Counts what torch warns of as a synchronisation, from step to step."""

    def __init__(self, caught: list[Any]) -> None:
        self.caught, self.counts, self._last = caught, [], 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        found = sum("synchroniz" in str(item.message) for item in self.caught)
        self.counts.append(found - self._last)
        self._last = found


@only_on_a_gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "varlen"])
def test_the_host_waits_once_per_step(kernel: str, tmp_path: Path, groups: list[TokenGroup]) -> None:
    trainer = trainer_of(tmp_path, groups, attention_kernel=kernel, bf16=True, max_steps=7, logging_steps=1000, optim="adamw_torch_fused")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waits = Waits(caught)
        trainer.add_callback(waits)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(waits.counts[2:]) <= 1, waits.counts


@only_on_a_gpu
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_peak_is_what_the_plan_says(method: str, tmp_path: Path) -> None:
    """Within 15 %, of what torch holds: without the context and the libraries, which the plan counts by themselves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from orpo.run.config import resolve
    from orpo.training.planning import make_plan

    LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    rows = random_groups(16, prompt=(200, 201), answer=(150, 151))
    keys = {"model_name_or_path": str(tmp_path), "dataset_name": "demo", "bf16": True, "per_device_train_batch_size": 8}
    keys |= {"use_peft": method == "lora", "lora_r": 8}
    config = resolve(None, [word for key, value in keys.items() for word in (f"--{key}", str(value))])
    plan = make_plan(config, config.training_args(), row_tokens=500.0, largest_microbatch_tokens=4000)
    arguments = {}
    if method == "lora":
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    options = {"use_cpu": False, "bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 3}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make_trainer(tmp_path / "run", rows, model=model, arguments=arguments, **options).train()
    peak = torch.cuda.max_memory_allocated() - before
    planned = plan.memory_bytes - plan.runtime_bytes
    assert abs(peak - planned) <= 0.15 * planned, f"planned {planned / 1e9:.2f} GB, held {peak / 1e9:.2f}"


@pytest.mark.parametrize(("kernel", "is_half"), [("sdpa", False), ("varlen", True), ("flex", False)])
def test_compiled_layers_follow_the_float32_run(
    kernel: str, is_half: bool, tmp_path: Path, groups: list[TokenGroup], exact: list[float]
) -> None:
    trainer = trainer_of(tmp_path, groups, engine="shared", attention_kernel=kernel, bf16=is_half, torch_compile=True, **compiler)
    trainer.train()
    assert trainer.compiled == "yes"
    assert trainer.graphs.num_late == 0
    largest, mean = (5e-2, 5e-3) if is_half else (1e-4, 1e-5)
    assert_same_trajectory(logged(trainer), exact, largest=largest, mean=mean)
