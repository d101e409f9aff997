"""What a spread run may start from, as users start it: adapter, GGUF file, own code, own model, a search's trials; equal to one process."""

from __future__ import annotations

import json
import shutil
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


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own(desk: Desk, model_folder) -> None:  # noqa: F811
    shutil.copytree(model_folder, desk.folder / "own")
    (desk.folder / "own" / "own.py").write_text(OWN_CODE)
    config = json.loads((desk.folder / "own" / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (desk.folder / "own" / "config.json").write_text(json.dumps(config))
    assert_one_and_two_agree(desk, "--model_name_or_path", "own", "--trust_remote_code", "--model_revision", "v1")


SEARCH = """
import sys
from orpo import ORPOConfig, ORPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
more = {"fsdp": "full_shard auto_wrap"} if sys.argv[2] == "two" else {}
args = ORPOConfig(
    output_dir=sys.argv[2], max_steps=2, logging_steps=1, per_device_train_batch_size=int(sys.argv[3]), save_strategy="no",
    bf16=False, report_to="none", **more,
)
trainer = ORPOTrainer(
    model_init=lambda trial=None: AutoModelForCausalLM.from_pretrained(sys.argv[1]), args=args, train_dataset="rows.jsonl",
    eval_dataset="rows.jsonl", processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
)
trainer.hyperparameter_search(
    hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3])}, n_trials=2, direction="minimize",
    backend="optuna",
)
"""


def test_a_search_of_hyperparameters(desk: Desk, model_folder) -> None:  # noqa: F811
    pytest.importorskip("optuna")
    (desk.folder / "script.py").write_text(SEARCH)
    for run, words in (("one", (sys.executable,)), ("two", (str(BIN / "torchrun"), "--nproc_per_node", "2"))):
        code, text = desk.type(*words, "script.py", str(model_folder), run, "2" if run == "one" else "1")
        assert code == 0, text
    for trial in ("run-0", "run-1"):
        assert losses(desk, f"two/{trial}") == pytest.approx(losses(desk, f"one/{trial}"), rel=1e-5)
        assert len(losses(desk, f"one/{trial}")) == 2
