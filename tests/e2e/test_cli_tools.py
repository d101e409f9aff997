"""check, plan, chat, export and demo on a tiny model: what they print, their exit codes, and that they leave nothing behind."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo import ORPOTrainer
from orpo.cli import main
from orpo.cli.demo import verdict
from orpo.config.shipped import FOLDER
from orpo.run.config import resolve
from orpo.run.data import prepare_data
from orpo.run.folder import COMPLETE, RunFolder
from orpo.training.planning import model_shape
from tinymodels import ARCHITECTURES

RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "chosen": None}]))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "bf16": False,
        "use_cpu": True,
    }


def config_file(tmp_path: Path, options: dict[str, Any]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


class TestCheck:
    def check(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
        code = main(["check", config_file(tmp_path, options), "--json", *flags])
        shown = capsys.readouterr()
        report = json.loads(shown.out)
        assert "Traceback" not in shown.err
        return code, {"is_ok": report["is_ok"], **{item["name"]: item for item in reversed(report["findings"])}, "all": report["findings"]}

    def test_a_run_that_would_work(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        code, found = self.check(tmp_path, options, capsys)
        assert (code, found["is_ok"]) == (0, True)
        names = ["configuration", "folder", "data", "template", "disk", "memory", "step"]
        assert list(dict.fromkeys(item["name"] for item in found["all"])) == names
        assert found["step"]["facts"]["loss"] > 0
        assert found["step"]["facts"]["grad_norm"] > 0
        assert found["data"]["facts"]["train"]["dropped"] == {"missing_field": 1}
        assert any(item["status"] == "warning" and "missing_field" in item["detail"] for item in found["all"])
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.glob(".orpo*"))

    def test_problems_are_told_together(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        """The folder, the data and the model at once; what depends on them is skipped."""
        (tmp_path / "file").write_text("in the way")
        changed = {
            **options,
            "output_dir": str(tmp_path / "file" / "run"),
            "dataset_name": "absent.jsonl",
            "model_name_or_path": "./absent",
        }
        code, found = self.check(tmp_path, changed, capsys)
        assert (code, found["is_ok"]) == (2, False)
        assert {name: found[name]["status"] for name in ("folder", "data", "model", "disk", "step")} == {
            "folder": "problem",
            "data": "problem",
            "model": "problem",
            "disk": "skipped",
            "step": "skipped",
        }

    def test_an_unwritable_folder(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        code, found = self.check(tmp_path, {**options, "output_dir": str(locked / "run")}, capsys, "--quick")
        assert (code, found["folder"]["status"]) == (2, "problem")

    def test_a_file_system_that_is_read_only(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        """Root may write wherever permissions forbid it, but not here."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
        try:
            code, found = self.check(tmp_path, {**options, "output_dir": str(disk / "run")}, capsys, "--quick")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        assert (code, found["folder"]["status"], found["disk"]["status"]) == (2, "problem", "skipped")
        assert "Read-only file system" in found["folder"]["detail"]

    def test_too_little_disk(
        self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orpo.cli.check.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        code, found = self.check(tmp_path, options, capsys, "--quick")
        assert (code, found["disk"]["status"]) == (2, "problem")
        assert "save_total_limit" in found["disk"]["detail"]

    def test_too_little_memory_is_a_warning(
        self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orpo.system.machine.memory_facts", lambda device: {"total_bytes": 2000, "free_bytes": 1000})
        code, found = self.check(tmp_path, options, capsys, "--quick")
        assert (code, found["memory"]["status"]) == (0, "warning")

    def test_nothing_to_train(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        code, found = self.check(tmp_path, {**options, "use_peft": True, "lora_target_modules": "nowhere"}, capsys)
        assert code == 2
        assert "lora_target_modules: the model has no layer 'nowhere'" in found["step"]["detail"]

    def test_a_broken_configuration(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        code, found = self.check(tmp_path, {**options, "max_stps": 3, "learning_rate": -1}, capsys)
        assert code == 2
        assert "max_stps" in found["configuration"]["detail"]
        assert "learning_rate" in found["configuration"]["detail"]
        assert found["step"]["status"] == "skipped"


EVALUATING = {"eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
CHECKED_AND_TRAINED = {
    "by step": EVALUATING,
    "by epoch": {"eval_fraction": 0.3, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "best model": {**EVALUATING, "load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"},
    "only better": {**EVALUATING, "save_strategy": "best", "load_best_model_at_end": True},
    "at the start": {**EVALUATING, "eval_on_start": True},
    "from another file": {"eval_dataset_name": "HELD_OUT", "eval_strategy": "steps", "eval_steps": 2},
    "held out, not evaluated on the way": {"eval_fraction": 0.3},
}


class TestCheckAndTrain:
    @pytest.mark.parametrize("added", CHECKED_AND_TRAINED.values(), ids=CHECKED_AND_TRAINED)
    def test_what_is_called_ready_runs(
        self, tmp_path: Path, options: dict[str, Any], added: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        held_out = tmp_path / "held-out.jsonl"
        held_out.write_text("".join(json.dumps({"prompt": f"Q{n}?", "chosen": f"Yes, {n}.", "rejected": "No."}) + "\n" for n in range(4)))
        given = {key: str(held_out) if value == "HELD_OUT" else value for key, value in added.items()}
        path = config_file(tmp_path, {**options, "per_device_train_batch_size": 2, **given})
        assert main(["check", path]) == 0, capsys.readouterr()
        assert not (tmp_path / "run").exists()
        assert main(["train", path]) == 0, capsys.readouterr()

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_every_recipe_works_with_one_file_of_rows(
        self, path: Path, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "checks.py").write_text("def passed(prompt, answer): return len(answer) > 3")
        rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(150)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
        if "load_in_4bit: true" in path.read_text():
            flags += ["--load_in_4bit=false", "--use_peft"]
        code = main(["check", str(path), "--model_name_or_path", str(model_folder), *flags])
        shown = capsys.readouterr()
        assert code == 0, shown
        assert re.search(r"data +\d+ of 150 (rows|prompts) to train on, [1-9]\d* held out", shown.err + shown.out)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("how", ["4bit", "8bit"])
    def test_a_package_that_is_missing_is_told_without_a_model_too(
        self, how: str, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orpo.models.quantized.find_spec", lambda name: None)
        assert main(["check", "--quick", config_file(tmp_path, {**options, f"load_in_{how}": True})]) == 2
        shown = capsys.readouterr()
        assert f"load_in_{how}: load_in_4bit and load_in_8bit need the package bitsandbytes" in shown.out + shown.err

    def test_the_trial_step_is_nobody_else_s_business(
        self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No repository is created and no tracker opened: transformers' trainer does both when it is built."""
        asked: list[str] = []
        monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *args, **kwargs: asked.append("hub"))
        monkeypatch.setattr(
            "transformers.trainer.get_reporting_integration_callbacks", lambda names: [asked.append(name) for name in names]
        )
        assert main(["check", config_file(tmp_path, {**options, "push_to_hub": True, "hub_model_id": "a/b", "report_to": "all"})]) == 0
        assert asked == []


@pytest.mark.parametrize("asked", [{"parallelism": "fsdp2"}, {"fsdp": "full_shard"}, {"parallelism": "zero3"}, {"deepspeed": "zero3.json"}])
def test_one_process_looks_ahead_of_a_run_of_several(
    asked: dict[str, str], tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration for a cluster is looked at where it is written; to train it alone is refused as before."""
    monkeypatch.chdir(tmp_path)
    Path("zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    path = config_file(tmp_path, {**options, **asked})
    for command in (["plan", path, "--hardware", "8xH100"], ["plan", path], ["audit", path], ["preview", path]):
        assert main(command) == 0, capsys.readouterr()
    assert main(["check", path]) == 0
    (key,), said = asked, capsys.readouterr().out
    assert f"warning  configuration  {key}: " in " ".join(said.split("\n"))
    assert f"{key} = {asked[key]}" in said, "as it was given"
    assert "ready: orpo train --num_processes N would run" in said
    assert main(["train", path]) == 2
    assert "there is one process" in capsys.readouterr().err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_can_be_planned(name: str, tmp_path: Path, tiny_model_factory) -> None:
    model = tiny_model_factory(name)
    model.config.save_pretrained(tmp_path)
    shape = model_shape(resolve(None, ["--model_name_or_path", str(tmp_path), "--dataset_name", "orpo-demo"]), "float32")
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.activation_bytes_per_token > shape.layer_input_bytes_per_token > 0


def test_a_model_whose_layer_types_follow_from_its_size_is_checked(
    tmp_path: Path, options: dict[str, Any], tiny_model_factory, tiny_tokenizer_factory, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("mamba", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    path = config_file(tmp_path, {**options, "model_name_or_path": str(tmp_path / "mamba")})
    assert main(["check", path]) == 0, capsys.readouterr()


class TestPlan:
    def plan(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
        assert main(["plan", config_file(tmp_path, options), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    def test_counts(self, tmp_path: Path, options: dict[str, Any], model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from transformers import AutoModelForCausalLM

        real = AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()
        plan = self.plan(tmp_path, options, capsys)
        assert (plan["num_parameters"], plan["num_trainable"]) == (real, real)
        assert plan["optimizer_bytes"] == 8 * real
        assert plan["data"]["num_rows"] == 12
        assert plan["num_steps"] == 4
        assert plan["seconds_per_step"] > 0
        assert self.plan(tmp_path, options, capsys, "--no_data")["tokens_per_step"] == 4 * 2 * 1024

    @pytest.mark.parametrize(
        ("extra", "num_steps"),
        [
            ({"max_steps": -1, "num_train_epochs": 2}, 4),
            ({"max_steps": 1}, 1),
            ({"max_steps": 3}, 3),
            ({"max_tokens_per_microbatch": 1}, 4),
        ],
    )
    def test_the_largest_micro_batch_is_that_of_the_run(
        self, tmp_path: Path, options: dict[str, Any], extra: dict[str, Any], num_steps: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"prompt": "Why?", "chosen": "so " * number**2, "rejected": "No."} for number in range(1, 13)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changed = {**options, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **extra}
        plan = self.plan(tmp_path, changed, capsys)
        config = resolve(config_file(tmp_path, changed))
        args = config.training_args()
        trainer = ORPOTrainer(config["model_name_or_path"], args, train_dataset=prepare_data(config, args, lambda line: None).train)
        found = []
        for epoch in range(2):
            trainer.train_sampler.set_epoch(epoch)
            found += [[batch.num_tokens for batch in step.microbatches] for step in trainer.get_train_dataloader()]
        assert plan["tokens_per_microbatch"] == max(itertools.chain(*found[:num_steps]))

    def test_memory_follows_dtype_and_rows(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        fp32, bf16 = (self.plan(tmp_path, {**options, "bf16": bf16}, capsys) for bf16 in (False, True))
        assert fp32["gradients_bytes"] == 2 * bf16["gradients_bytes"] == 4 * fp32["num_parameters"]
        assert fp32["logits_bytes"] == 2 * bf16["logits_bytes"]
        tiny = self.plan(tmp_path, {**options, "bf16": False, "logits_budget_mb": 1, "max_length": 4096}, capsys, "--no_data")
        assert tiny["logits_bytes"] == 2**20
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "runtime")
        assert fp32["memory_bytes"] == sum(fp32[f"{part}_bytes"] for part in parts)

    def test_adapter_weights_are_peft_s(
        self, tmp_path: Path, options: dict[str, Any], model_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        for extra in ({}, {"lora_target_modules": ["q_proj", "down_proj"]}, {"lora_r": 3, "lora_modules_to_save": ["lm_head"]}):
            changed = {**options, "use_peft": True, **extra}
            plan = self.plan(tmp_path, changed, capsys, "--no_data")
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(model_folder), resolve(config_file(tmp_path, changed)).peft_config()
            )
            assert plan["num_trainable"] == model.get_nb_trainable_parameters()[0], extra

    def test_a_terminal_s_report(self, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", config_file(tmp_path, options), "--gradient_checkpointing"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("parameters", "memory", "activations", "checkpoint", "time"))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3"])
def test_activations_are_counted_as_autograd_counts_them(name: str, tmp_path: Path, tiny_model_factory) -> None:
    """Against the tensors that a real forward pass on the CPU saves; the attention's own differ by kernel."""
    import torch

    from orpo.training.planning import _activation_bytes

    model = tiny_model_factory(name, vocab_size=64, num_layers=4).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = 96
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    real = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own) / tokens
    assert kept is not None
    estimate, one_layer, _ = _activation_bytes(model.config, torch.float32)
    assert 0.6 * real < estimate < 1.5 * real
    assert estimate >= 4 * one_layer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    flags = ["--model_name_or_path", str(model_folder), "--output_dir", str(folder), "--max_steps", "2", "--use_cpu", "--bf16", "false"]
    assert main(["demo", *flags]) == 0
    return folder


class TestDemoAndAfter:
    def test_the_demo_leaves_a_whole_run(self, run_dir: Path) -> None:
        facts = RunFolder(run_dir).read()
        assert facts is not None
        assert (facts["status"], facts["command"]) == (COMPLETE, "demo")
        assert facts["configuration"]["orpo_alpha"] == {"value": 1.0, "origin": "demo"}
        outcome = json.loads((run_dir / "eval" / "demo.json").read_text(encoding="utf-8"))
        assert outcome["before"]["num_pairs"] == outcome["after"]["num_pairs"] == 60
        change = outcome["after"]["margin"]["value"] - outcome["before"]["margin"]["value"]
        assert outcome["change"]["margin"]["value"] == pytest.approx(change, abs=1e-9)
        assert len(outcome["answers"]) == 3
        assert all({"prompt", "before", "after"} == set(answer) for answer in outcome["answers"])

    def test_again_shows_the_same_and_does_nothing(self, run_dir: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = [
            "--model_name_or_path",
            str(model_folder),
            "--output_dir",
            str(run_dir),
            "--max_steps",
            "2",
            "--use_cpu",
            "--bf16",
            "false",
        ]
        assert main(["demo", *flags, "--json"]) == 0
        shown = capsys.readouterr()
        for part in ("is complete", "60 held-out pairs", "accuracy", "95 % interval", "before", "after", "orpo chat"):
            assert part in shown.err
        assert json.loads(shown.out)["folder"] == str(run_dir)

    def test_chat_answers_once(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["chat", str(run_dir), "--prompt", "Hello", "--max_new_tokens", "5"]) == 0
        shown = capsys.readouterr()
        assert shown.out.strip()
        assert "Traceback" not in shown.err

    def test_chat_remembers_and_forgets(self, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def generate(model: Any, tokenizer: Any, encoder: Any, prompts: Any, **_: Any) -> list[Any]:
            from orpo.inference.generate import Answer

            asked.append([(message["role"], message["content"]) for message in prompts[0]])
            return [Answer(f"answer {len(asked)}", 2, "stop")]

        monkeypatch.setattr("orpo.inference.conversation.generate", generate)
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\n\nthree\n/quit\nnever\n"))
        assert main(["chat", str(run_dir), "--system", "Be brief."]) == 0
        system = ("system", "Be brief.")
        assert asked == [
            [system, ("user", "one")],
            [system, ("user", "one"), ("assistant", "answer 1"), ("user", "two")],
            [system, ("user", "three")],
        ]
        assert capsys.readouterr().out.splitlines() == ["answer 1", "answer 2", "answer 3"]

    def test_chat_with_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["chat", str(tmp_path / "absent"), "--prompt", "x"]) == 2
        assert "there is no such folder" in capsys.readouterr().err

    def test_export_merged(self, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "out"
        assert main(["export", str(run_dir), "--out", str(target), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["path"] == str(target)
        assert (target / "model.safetensors").is_file()
        assert main(["export", str(run_dir), "--out", str(target)]) == 2
        assert "overwriting" in capsys.readouterr().err
        assert main(["export", str(run_dir), "--out", str(target), "--overwrite", "--dtype", "bfloat16"]) == 0

    def test_export_of_what_is_not_there(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export", str(run_dir), "--to", "adapter"]) == 2
        assert "no adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 0.2, "rose"), (-0.2, -0.1, "fell"), (-0.1, 0.1, "cannot be told"), (None, None, "too few")]
)
def test_the_demo_claims_no_more_than_its_interval(low: float | None, high: float | None, word: str) -> None:
    assert word in verdict({"margin": {"value": 0.15, "low": low, "high": high}})


def test_the_demo_praises_no_margin_that_pushed_both_answers_away() -> None:
    change = {"margin": {"value": 0.15, "low": 0.1, "high": 0.2}, "chosen_logp": {"value": -1.0, "low": -1.5, "high": -0.5}}
    assert "less likely" in verdict(change)
    assert "leans to the good answers" not in verdict(change)


@pytest.mark.parametrize(
    ("form", "taken", "told"), [("merged", "folder", "this place is taken"), ("gguf", "m.gguf", "something of this name")]
)
def test_a_place_that_is_taken_is_told_before_a_model_is_loaded(
    form: str, taken: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "m.gguf").write_text("mine")
    assert main(["export", "no-such-model", "--to", form, "--out", str(tmp_path / taken)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "--overwrite" in said
    assert "loading" not in said
