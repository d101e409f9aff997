"""`orpo plan --hardware`: what it reads, what it adds up, and how near it is to what processes here come to hold."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

import orpo
from adapted import adapt
from faults.forked import Zygote
from orpo.cli.plan import sample_lengths
from orpo.errors import UserError
from orpo.models.export import export_merged
from orpo.models.load import load_model
from orpo.run.config import resolve
from orpo.training.hardware import RankPlan, parse_hardware, plan_ranks
from orpo.training.planning import frozen_bytes, make_plan, model_shape
from tinymodels import build_tiny_model, build_tiny_tokenizer

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 M weights: enough to stand out beside a process's libraries."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def plans(model_folder: Path, hardware: str, **keys: Any) -> dict[str, RankPlan]:
    given = {"model_name_or_path": str(model_folder), "dataset_name": "demo", "bf16": False, "use_cpu": True, **keys}
    config = resolve(None, [word for key, value in given.items() for word in (f"--{key}", str(value))])
    args = config.training_args()
    lengths = sample_lengths(config, args)[0] if "max_steps" in keys else {"row_tokens": 60.0, "largest_microbatch_tokens": 200}
    plan = make_plan(config, args, **lengths)
    shape = model_shape(config, "float32")
    found = plan_ranks(plan, shape, config, args, parse_hardware(hardware), dtype="float32", flops=1e11)
    return {rank.kind: rank for rank in found}


@pytest.mark.parametrize(
    ("text", "machines", "each"), [("8xH100", 1, 8), ("2x8xA100", 2, 8), ("1xL4", 1, 1), ("h200", 1, 1), ("cpu", 1, 1), ("4xCPU", 1, 4)]
)
def test_hardware_is_read(text: str, machines: int, each: int) -> None:
    found = parse_hardware(text)
    assert (found.num_machines, found.per_machine) == (machines, each)
    assert (found.device is None) == ("cpu" in text.lower())


@pytest.mark.parametrize("text", ["", "8", "8xH1000", "x8xH100", "2x2x2xL4", "0xL4", "-1xL4", "8 H100"])
def test_hardware_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="found"):
        parse_hardware(text)


def test_parts_in_shards_go_down_with_the_number_of_processes(model_folder: Path) -> None:
    few, many = plans(model_folder, "2xH100")["fsdp2"], plans(model_folder, "8x8xH100")["fsdp2"]
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(few, part) == pytest.approx(32 * getattr(many, part), rel=1e-6)
    whole = plans(model_folder, "8x8xH100")["ddp"]
    assert whole.optimizer_bytes == pytest.approx(64 * many.optimizer_bytes, rel=1e-6)
    assert whole.seconds_per_step is not None
    assert list(plans(model_folder, "L4")) == ["ddp"], "one process has nothing to share"


def test_what_is_never_held_at_once_counts_once(model_folder: Path) -> None:
    """Gradients come as activations go, unless a micro-batch before has left its own; ZeRO-3 has room for them from the start."""
    one = plans(model_folder, "2xcpu", per_device_train_batch_size=2)
    several = plans(model_folder, "2xcpu", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for kind, rank in one.items():
        later = rank.gradients_bytes + (rank.gathered_bytes if kind == "zero2" else 0)
        activations = rank.activations_bytes + rank.logits_bytes
        always = min(rank.gathered_bytes, activations) if kind == "zero2" else 0
        assert several[kind].memory_bytes - rank.memory_bytes == (0 if kind == "zero3" else min(later, activations) - always), kind
    assert plans(model_folder, "2xH100")["ddp"].freed_bytes == one["fsdp2"].freed_bytes == 0 < one["ddp"].freed_bytes


@pytest.mark.parametrize(
    ("stored", "more", "bytes_each"), [("float32", {}, 2), ("bfloat16", {}, 6), ("float32", {"bf16_weights": False}, 6)]
)
def test_a_frozen_base_counts_once_where_it_is_let_go_of(stored: str, more: dict[str, Any], bytes_each: int, tmp_path: Path) -> None:
    """A float32 file stays mapped, and a step reads the bf16 copies alone; what was converted to float32 is held beside them."""
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype=stored, num_hidden_layers=2).save_pretrained(tmp_path)
    keys = {"model_name_or_path": str(tmp_path), "dataset_name": "demo", "bf16": True, "use_cpu": True, "use_peft": True, **more}
    config = resolve(None, [word for key, value in keys.items() for word in (f"--{key}", str(value))])
    plan = make_plan(config, config.training_args())
    assert plan.weights_bytes == bytes_each * plan.num_parameters + 6 * plan.num_trainable


LORA: dict[str, Any] = {"use_peft": True, "lora_r": 8}
RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}
RUNS: list[tuple[int, str, dict[str, Any]]] = [
    (1, "ddp", {}), (2, "ddp", {}), (2, "fsdp2", {}), (4, "fsdp2", {}), (2, "fsdp2", RECOMPUTED), (2, "zero2", {}), (2, "zero3", {}),
    (1, "ddp", LORA), (2, "ddp", LORA), (2, "fsdp2", LORA), (4, "fsdp2", LORA), (2, "ddp", {**LORA, **RECOMPUTED}), (2, "zero3", LORA),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3000)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_is_near_what_processes_here_hold(model_folder: Path, forks: Zygote, tmp_path: Path) -> None:
    """Whole processes to 15 %; beside that what they hold above their libraries, which is most of what the plan is about."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    row = {"chosen": "It is blue, as far as one can see from here.", "rejected": "It is green, and nobody knows why."}
    rows = [{**row, "prompt": f"Which colour has the sky over town number {number}?"} for number in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_name": tmp_path / "rows.jsonl", "max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    table, errors = [], []
    for num_ranks, kind, keys in RUNS:
        if kind.startswith("zero") and find_spec("deepspeed") is None:
            continue
        given = {**common, **keys, "model_name_or_path": tmp_path / "model"}
        (planned,) = (plan for name, plan in plans(tmp_path / "model", f"{num_ranks}xcpu", **given).items() if name == kind)
        run = tmp_path / f"run-{len(table)}"
        logs = [tmp_path / f"rank-{rank}.log" for rank in range(num_ranks)]
        given |= {"use_cpu": True, "bf16": False, **({"parallelism": kind} if num_ranks > 1 else {})}
        flags = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in given.items()]
        ends = forks.run_ranks("trainerruns:held_by_a_run", logs, output_dir=str(run), flags=flags)
        assert [end.status for end in ends] == [0] * num_ranks, logs[0].read_text()
        found = [json.loads((run / f"held-{rank}.json").read_text()) for rank in range(num_ranks)]
        held = max(max(rank["training"], rank["start"]) for rank in found)
        above = planned.memory_bytes - planned.runtime_bytes
        errors.append((planned.memory_bytes - (held + planned.runtime_bytes)) / (held + planned.runtime_bytes))
        names = [f"{name} {getattr(planned, name + '_bytes') >> 20}" for name in PARTS]
        what = f"{num_ranks} {kind:<5} {' '.join(keys) or 'full'}"
        table.append(
            f"{what:<45} planned {above >> 20:5} held {held >> 20:5} MiB, whole process {errors[-1]:+.0%}   {', '.join(names)}; {found[0]}"
        )
        shutil.rmtree(run)
        print(table[-1], flush=True)
    assert max(map(abs, errors)) <= 0.15, "\n".join(table)


@pytest.mark.parametrize("recipe", ["qlora-7b.yaml", "lora-7b.yaml"])
def test_a_recipe_says_what_the_plan_says(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the recipe's head has the command; the model's shape stands in for the model, which is on the hub."""
    from orpo.cli import main

    Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        tie_word_embeddings=False, max_position_embeddings=32_768, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    head = (Path(orpo.__file__).parent / "recipes" / recipe).read_text(encoding="utf-8")
    command, said = re.search(r"`orpo (plan .*?)` says ([\d.]+) GiB", head).groups()
    room_gb = float(re.search(r"with (\d+) GB", head)[1])
    assert main([*command.split(), "--model_name_or_path", str(tmp_path)]) == 0
    planned = re.search(r"ddp +([\d.]+) GiB a process", capsys.readouterr().out)[1]
    assert planned == said
    assert float(planned) * 2**30 < 0.95 * room_gb * 1e9


@pytest.mark.parametrize("keys", [{"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}], ids=["plain", "nested"])
def test_quantized_weights_are_counted_as_they_are_held(keys: dict[str, Any], tmp_path: Path) -> None:
    """Packed layers with their constants; the rest, which PEFT brings into float32."""
    pytest.importorskip("bitsandbytes")
    export_merged(build_tiny_model("qwen2", vocab_size=1024, hidden_size=256), build_tiny_tokenizer(), tmp_path / "model")
    adapted = adapt(load_model(tmp_path / "model", device="cpu", **keys).model, r=8)
    held = 0
    for name, weight in adapted.named_parameters():
        state = getattr(weight, "quant_state", None)
        held += 0 if "lora_" in name else weight.numel() * weight.element_size()
        for constants in (state, getattr(state, "state2", None)):
            held += 0 if constants is None else constants.absmax.numel() * constants.absmax.element_size()
    given = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": "demo", "lora_r": 8, **keys}
    config = resolve(None, [word for key, value in given.items() for word in (f"--{key}", str(value))])
    assert frozen_bytes(config, model_shape(config, "float32")) == pytest.approx(held, rel=0.005)
