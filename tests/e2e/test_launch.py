"""Several processes, started as a user types it, with no flag for them: one training, or a stop that says what to do."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from orpo.cli import main
from orpo.config.parallelism import Parallelism, parallelism_of, sharding_problems
from orpo.errors import UserError
from orpo.system.launch import _exit_code, refuse_several
from orpo.system.place import Place, adopt, read_place

SOURCE = Path(__file__).parents[2] / "src"
BIN = Path(sys.executable).parent
NUM_ROWS = 24
SAID_ONCE = ("folder  ", "model  ", "step 1/4", "step 4/4", "done  ")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LAUNCH = SOURCE / "orpo" / "recipes" / "launch"


class Desk:
    """A folder with rows and a configuration, in which commands are typed."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.write_rows(NUM_ROWS)
        config = {
            "model_name_or_path": str(model), "dataset_name": "rows.jsonl", "output_dir": "run", "per_device_train_batch_size": 2,
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "orpo_alpha": 1.0, "bf16": False,
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(config))

    def write_rows(self, number: int, name: str = "rows.jsonl") -> None:
        rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(number)]
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Type a command; the environment is that of a user without GPU, and what is given."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_", "RANK", "WORLD_"))}
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={**known, "PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(*words, **environment)
        text, _ = process.communicate(timeout=200)
        return process.returncode, text

    def ranks(self, *environments: dict[str, str], words: tuple[str, ...] = ("train", "run.yaml")) -> list[tuple[int, str]]:
        """One process per environment, as a scheduler starts them; the output of each stays apart."""
        processes = [self.start(sys.executable, "-m", "orpo", *words, **environment) for environment in environments]
        texts = [process.communicate(timeout=200)[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]

    def assert_one_training(self, text: str, world_size: int = 2, weights: str = "model/model.safetensors") -> None:
        facts = json.loads((self.run / "run.json").read_text())
        assert (facts["status"], facts["world_size"]) == ("complete", world_size), text
        steps = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "nll_loss" in line] == [1, 2, 3, 4], text
        assert (self.run / weights).is_file()
        for line in SAID_ONCE:
            assert text.count(line) == 1, text
        warnings = [line for line in text.splitlines() if line.startswith("warning")]
        assert sorted(warnings) == sorted(set(warnings)), text  # not by every process


@pytest.fixture
def desk(tmp_path: Path, model_folder: Path) -> Desk:
    return Desk(tmp_path, model_folder)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torch_names(rank: int, port: str, size: int = 2) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def slurm_names(rank: int, job: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "node07",
    }  # fmt: skip


# ---- one training


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "words",
    [
        (str(BIN / "torchrun"), "--nproc_per_node", "2", "-m", "orpo", "train", "run.yaml"),
        (str(BIN / "orpo"), "train", "run.yaml", "--num_processes", "2"),
        (str(BIN / "torchrun"), "--nproc_per_node", "2", "-m", "orpo.cli", "train", "run.yaml"),
        (str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "-m", "orpo", "train", "run.yaml"),
        (str(BIN / "torchrun"), "--nproc_per_node", "3", str(BIN / "orpo"), "train", "run.yaml"),
    ],
    ids=["torchrun", "num_processes", "torchrun of the package", "accelerate", "three of the script"],
)
def test_a_launch_without_a_flag_for_it_is_one_training(words: tuple[str, ...], desk: Desk) -> None:
    """By default the sharded launch below and the signal to the short form prove what these do."""
    code, text = desk.type(*words)
    assert code == 0, text
    desk.assert_one_training(text, world_size=3 if "3" in words else 2)


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "words",
    [
        (str(BIN / "torchrun"), "--nproc_per_node", "2", "-m", "orpo", "train", "run.yaml", "--fsdp", "full_shard auto_wrap"),
        pytest.param(
            (str(BIN / "orpo"), "train", "run.yaml", "--num_processes", "2", "--parallelism", "fsdp2", "--use_peft"), marks=pytest.mark.slow
        ),
        pytest.param(
            (
                *(str(BIN / "accelerate"), "launch", "--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "2"),
                *("-m", "orpo", "train", "run.yaml"),
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "num_processes", "accelerate"],
)
def test_a_sharded_run_ends_with_an_ordinary_folder_that_the_other_commands_read(
    words: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = desk.type(*words, "--disable_dropout", "false")
    assert code == 0, text
    assert text.count("processes    2, gloo, fsdp2") == 1, text
    assert text.count("warning: dropout is on") == 1, text
    desk.assert_one_training(text, weights="adapter/adapter_model.safetensors" if "--use_peft" in words else "model/model.safetensors")
    assert (desk.run / "checkpoint-4" / "sharded").is_dir()
    # The checkpoint of the last step, in parts, is the same model.
    monkeypatch.chdir(desk.folder)
    for name in ("run", "run/checkpoint-4"):
        assert main(["export", name, "--out", f"plain-{Path(name).name}"]) == 0
    one, other = (load_file(desk.folder / f"plain-{name}" / "model.safetensors") for name in ("run", "checkpoint-4"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if "torchrun" not in words[0]:
        assert main(["eval", "run/checkpoint-4", "--data", "rows.jsonl", "--tasks", "pairs"]) == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("flags", [["--parallelism", "zero2"], ["--deepspeed", str(LAUNCH / "zero3.json")]], ids=["zero2", "zero3"])
@pytest.mark.parametrize("adapter", [[], ["--use_peft"]], ids=["full", "lora"])
def test_zero_in_bf16_ends_with_an_ordinary_folder(flags: list[str], adapter: list[str], desk: Desk) -> None:
    words = [sys.executable, "-m", "orpo", "train", "run.yaml", "--num_processes", "2", "--bf16", "true", *flags, *adapter]
    code, text = desk.type(*words, DS_ACCELERATOR="cpu")
    assert code == 0, text
    desk.assert_one_training(text, weights="adapter/adapter_model.safetensors" if adapter else "model/model.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_tasks_that_srun_starts_are_one_training(desk: Desk) -> None:
    """As Slurm describes tasks; no launcher has set torch's names."""
    job = str(int(free_port()))
    ends = desk.ranks(slurm_names(0, job), slurm_names(1, job))
    assert [code for code, _ in ends] == [0, 0], ends
    desk.assert_one_training(ends[0][1])
    assert not [line for line in SAID_ONCE if line in ends[1][1]]


SCRIPT = """
import pathlib, sys
from orpo import ORPOConfig, ORPOTrainer
trainer = ORPOTrainer(
    model=sys.argv[1], args=ORPOConfig(output_dir="run", max_steps=4, logging_steps=1, per_device_train_batch_size=2, report_to="none",
                    disable_dropout=False),
    train_dataset="rows.jsonl",
)
trainer.train()
pathlib.Path(f"rank-{trainer.args.process_index}").write_text(f"{trainer.args.world_size} {trainer.args.use_cpu}")
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_script_under_torchrun_is_one_training(desk: Desk, model_folder: Path) -> None:
    (desk.folder / "script.py").write_text(SCRIPT)
    code, text = desk.type(str(BIN / "torchrun"), "--nproc_per_node", "2", "script.py", str(model_folder))
    assert code == 0, text
    assert text.count("dropout is on") == 1, text
    steps = [json.loads(line) for line in (desk.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "nll_loss" in line] == [1, 2, 3, 4]
    said = [(desk.folder / f"rank-{rank}").read_text() for rank in range(2)]
    assert said == ["2 False"] * 2, "the user's options are as they were"


# ---- a stop

WITHOUT_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--learning_rte", "1"], "did you mean 'learning_rate'"),
        (["--fsdp", "--fsdp_config", '{"transformer_layer_cls_to_wrap": "LlamaLayer"}'], "no module of LlamaForCausalLM is a LlamaLayer"),
        (["--parallelism", "fsdp2", "--use_peft", "--load_in_4bit"], "bitsandbytes packs four-bit weights anew on a CPU"),
        pytest.param(["--parallelism", "zero3"], "needs the package deepspeed, which is not installed", marks=WITHOUT_DEEPSPEED),
    ],
    ids=["a wrong key", "a layer that there is not", "packed weights", "deepspeed is not installed"],
)
def test_what_is_wrong_on_all_processes_is_told_once_with_exit_code_2(flags: list[str], told: str, desk: Desk) -> None:
    code, text = desk.type(str(BIN / "orpo"), "train", "run.yaml", "--num_processes", "2", *flags)
    assert code == 2, text
    assert text.count(told) == 1, text
    assert "Traceback" not in text
    assert "loading  " not in text, "before a model is read"


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("second", "told"),
    [
        (["--learning_rate", "2e-3"], "learning_rate: rank 0 has 0.001, rank 1 has 0.002"),
        pytest.param(["--dataset_name", "other.jsonl"], "dataset_name: rank 0 has 'rows.jsonl', rank 1 has", marks=pytest.mark.slow),
        pytest.param(["--learning_rte", "1"], "rank 1: The configuration has 1 problem", marks=pytest.mark.slow),
    ],
    ids=["an option", "the data", "a mistake on one"],
)
def test_processes_that_would_train_different_things_stop_and_rank_0_names_it(second: list[str], told: str, desk: Desk) -> None:
    desk.write_rows(NUM_ROWS - 1, "other.jsonl")
    port = free_port()
    commands = [(torch_names(0, port), []), (torch_names(1, port), second)]
    processes = [desk.start(sys.executable, "-m", "orpo", "train", "run.yaml", *flags, **names) for names, flags in commands]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], texts
    assert told in texts[0]
    assert texts[1].strip() == ""
    assert "model  " not in texts[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_file_that_differs_between_machines_is_found_before_the_model_is_loaded(desk: Desk, tmp_path: Path) -> None:
    """The same command, the same name, other rows: each process sees its own disk."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = Desk(elsewhere, Path(yaml.safe_load((desk.folder / "run.yaml").read_text())["model_name_or_path"]))
    other.write_rows(NUM_ROWS - 1)
    port = free_port()
    processes = [
        one.start(sys.executable, "-m", "orpo", "train", "run.yaml", **torch_names(r, port)) for r, one in enumerate((desk, other))
    ]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], texts
    assert "training rows: rank 0 has '24 rows, hash" in texts[0]
    assert "rank 1 has '23 rows, hash" in texts[0]
    assert texts[1].strip() == ""


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_process_that_never_comes_stops_the_others(desk: Desk) -> None:
    code, text = desk.type(sys.executable, "-m", "orpo", "train", "run.yaml", "--ddp_timeout", "3", **torch_names(0, free_port()))
    assert code == 2, text
    assert "not all of 2 processes met" in text
    assert "unset WORLD_SIZE to train with one process" in text
    assert "Traceback" not in text


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_short_form_saves_and_the_same_command_goes_on(number: int, desk: Desk) -> None:
    words = [str(BIN / "orpo"), "train", "run.yaml", "--num_processes", "2", "--max_steps", "2000", "--save_steps", "1000"]
    process = desk.start(*words)
    while not (desk.run / "metrics.jsonl").exists() or not (desk.run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + number, text
    assert text.count("stopped by") == text.count("saving after this step") == 1, text
    assert "the same command continues from there" in text
    assert list(desk.run.glob("checkpoint-*")), text


@pytest.mark.parametrize("command", ["compare", "audit"])
def test_a_command_of_one_process_is_refused_where_a_launcher_has_started_several(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        for name, value in torch_names(rank, "1").items():
            monkeypatch.setenv(name, value)
        assert main([command, "run"]) == 2
        told = capsys.readouterr().err
        assert ("this command is done by one" in told) == (rank == 0), "process 0 alone says it"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for name in torch_names(0, "1"):
        monkeypatch.delenv(name)
    refuse_several(command)  # one process inside an allocation for several


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_launchers_at_once_are_refused_by_process_0_alone(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**torch_names(int(rank), "29500"), "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger("orpo"), "level", logging.INFO)
    assert main(["train", "run.yaml", "--num_processes", "2"]) == 2
    assert ("use one of the two" in capsys.readouterr().err) == (rank == "0")


def test_the_batch_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)


def test_accelerate_that_starts_one_of_several_is_stopped(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sets an address to meet at, and no more, when it has no GPUs to start processes for."""
    monkeypatch.chdir(desk.folder)
    names = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "run.yaml"]) == 2
    assert "orpo train --num_processes N" in capsys.readouterr().err


# ---- the rules, without processes


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "1"}, Place(0, 1, 0, 1, "WORLD_SIZE")),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "4"}, Place(0, 1, 0, 1, "WORLD_SIZE")),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2, "WORLD_SIZE")),
        ({**slurm_names(1, "7")}, Place(1, 2, 1, 2, "SLURM_STEP_NUM_TASKS")),
        ({**slurm_names(1, "7"), "WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 1, 4, "WORLD_SIZE")),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Place(1, 2, 1, 2, "OMPI_COMM_WORLD_SIZE")),
        (
            {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"},
            Place(4, 5, 0, 1, "SLURM_STEP_NUM_TASKS"),
        ),
    ],
)
def test_a_place_is_read_from_what_the_launcher_says(environ: dict[str, str], place: Place) -> None:
    assert read_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "nothing says where the processes meet"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "was not started by srun"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "has started one"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused_with_a_mend(environ: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        adopt(dict(environ))
    assert caught.value.mend or caught.value.expected


@pytest.mark.parametrize(
    ("nodes", "host"), [("node07", "node07"), ("node[03-05,9]", "node03"), ("a-1,b-2", "a-1"), ("gpu-[7],login", "gpu-7")]
)
def test_tasks_on_several_nodes_meet_at_the_first(nodes: str, host: str) -> None:
    environ = {**slurm_names(1, "70001"), "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": nodes}
    adopt(environ)
    assert environ["MASTER_ADDR"] == host
    assert 20_000 <= int(environ["MASTER_PORT"]) < 32_000


@pytest.mark.parametrize(
    ("values", "environ", "wanted"),
    [
        ({"parallelism": "fsdp2"}, {}, {}),
        ({"fsdp": True}, {}, {}),
        ({"fsdp": "true"}, {}, {}),
        ({"fsdp": "full_shard auto_wrap"}, {}, {}),
        ({"fsdp": ["full_shard"]}, {}, {}),
        ({"fsdp": "full_shard", "parallelism": "fsdp2"}, {}, {}),
        ({"fsdp": "shard_grad_op offload"}, {}, {"reshards": False, "offloads": True}),
        ({"fsdp": "hybrid_shard"}, {}, {"is_hybrid": True}),
        ({"fsdp": True, "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "A,B"}}, {}, {"layers": ("A", "B")}),
        ({"parallelism": "fsdp2", "fsdp_config": {"reshard_after_forward": False}}, {}, {"reshards": False}),
        ({"parallelism": "fsdp2", "fsdp_config": {"cpu_offload": True}}, {}, {"offloads": True}),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {}),
        (
            {},
            {
                "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
            },
            {"reshards": False, "offloads": True, "layers": ("LlamaDecoderLayer",)},
        ),
    ],
)  # fmt: skip
def test_every_way_to_ask_for_fsdp_means_it(values: dict[str, Any], environ: dict[str, str], wanted: dict[str, Any]) -> None:
    environ = {**torch_names(0, "1"), **environ}
    assert sharding_problems(values, environ) == []
    found = parallelism_of(values, environ)
    assert found == Parallelism("fsdp2", found.asked_by, **wanted)
    alone = sharding_problems(values, {name: value for name, value in environ.items() if name not in torch_names(0, "1")})
    assert [problem.where for problem in alone] == [found.asked_by], "one process shards nothing"
    assert "there is one process" in str(alone[0])


@pytest.mark.parametrize(
    ("values", "environ", "where"),
    [
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({"fsdp_config": {"version": 2}}, {}, "fsdp_config"),
        ({"fsdp": "fullshard"}, {}, "fsdp"),
        ({"fsdp": "no_shard"}, {}, "fsdp"),
        ({"fsdp": True, "parallelism": "ddp"}, {}, "parallelism"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, {}, "fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"transformer_layer_class_to_wrap": "X"}}, {}, "fsdp_config"),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, {}, "fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, {}, "fsdp_config"),
        ({"fsdp": True, "torch_compile": True}, {}, "torch_compile"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "accelerate launch"),
    ],
)
def test_a_sharding_that_would_not_be_applied_is_refused(values: dict[str, Any], environ: dict[str, str], where: str) -> None:
    problems = sharding_problems(values, {**torch_names(0, "1"), **environ})
    assert [problem.where for problem in problems] == [where]
    assert problems[0].mend or problems[0].expected


@pytest.mark.parametrize("values", [{}, {"fsdp": ""}, {"fsdp": []}, {"fsdp": False, "fsdp_config": None, "deepspeed": None}])
def test_no_sharding_asked_for_is_no_problem(values: dict[str, Any]) -> None:
    assert sharding_problems(values, {"ACCELERATE_USE_FSDP": "false"}) == []


@pytest.mark.parametrize(
    ("codes", "code"), [([2, 143], 2), ([143, 3], 3), ([-15, 1], 1), ([143, 143], 143), ([-9, -15], 137), ([0, 2], 2), ([130, 130], 130)]
)
def test_the_exit_code_is_that_of_the_first_cause(codes: list[int], code: int) -> None:
    assert _exit_code(codes) == code
