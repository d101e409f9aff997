"""What a spread run may start from, as users start it: an adapter, a GGUF file, a model of a script's own; the losses are one process's."""

from __future__ import annotations

import json
import sys

import pytest

from e2e.test_launch import BIN, Desk, desk, model_folder  # noqa: F401 - fixtures

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]

ORPO = (sys.executable, "-m", "orpo")
SPREAD = ("--num_processes", "2", "--parallelism", "fsdp2", "--per_device_train_batch_size", "1")


def losses(desk: Desk, run: str) -> list[float]:  # noqa: F811
    lines = map(json.loads, (desk.folder / run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "nll_loss" in line]


def assert_one_and_two_agree(desk: Desk, *start: str) -> None:  # noqa: F811
    for run, more in (("one", ()), ("two", SPREAD)):
        code, text = desk.type(*ORPO, "train", "run.yaml", *start, "--output_dir", run, *more)
        assert code == 0, text
    assert losses(desk, "two") == pytest.approx(losses(desk, "one"), rel=1e-5)


def test_an_adapter_is_trained_on(desk: Desk) -> None:  # noqa: F811
    code, text = desk.type(*ORPO, "train", "run.yaml", "--use_peft", "--output_dir", "first")
    assert code == 0, text
    assert_one_and_two_agree(desk, "--model_name_or_path", "first/adapter")
    assert losses(desk, "one")[0] < losses(desk, "first")[0], "it was begun where the first run ended"
    assert (desk.folder / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_gguf_file(desk: Desk, model_folder) -> None:  # noqa: F811
    code, text = desk.type(*ORPO, "export", str(model_folder), "--to", "gguf", "--out", "start.gguf")
    assert code == 0, text
    assert_one_and_two_agree(desk, "--model_name_or_path", "start.gguf")


SCRIPT = """
import sys
import torch
from orpo import ORPOConfig, ORPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.manual_seed(0)  # of the new rows
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
rows, more = int(sys.argv[3]), {"fsdp": "full_shard auto_wrap"} if sys.argv[2] == "two" else {}
args = ORPOConfig(
    output_dir=sys.argv[2], max_steps=4, logging_steps=1, per_device_train_batch_size=rows, learning_rate=1e-3, bf16=False,
    report_to="none", **more,
)
ORPOTrainer(model=model, args=args, train_dataset="rows.jsonl", processing_class=tokenizer).train()
"""


def test_a_script_whose_vocabulary_has_grown(desk: Desk, model_folder) -> None:  # noqa: F811
    (desk.folder / "script.py").write_text(SCRIPT)
    for run, words in (("one", (sys.executable,)), ("two", (str(BIN / "torchrun"), "--nproc_per_node", "2"))):
        code, text = desk.type(*words, "script.py", str(model_folder), run, "2" if run == "one" else "1")
        assert code == 0, text
    assert losses(desk, "two") == pytest.approx(losses(desk, "one"), rel=1e-5)
