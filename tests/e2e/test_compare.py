"""`orpo compare` on a tiny model: what each method is given, what is counted, what is decided, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from orpo.cli import main
from orpo.compare import CompareOptions, Split, compare, comparison, measure, process, stage
from orpo.errors import EXIT_GUARD, GuardStop, UserError
from orpo.objective import KINDS
from orpo.run.config import RunConfig, resolve

NUM_ROWS = 40
GRID: dict[str, Any] = {"learning_rates": (1e-3, 1e-2), "strengths": {"orpo": (0.5, 2.0), "simpo": (2.0,), "sft+dpo": (0.1, 1.0)}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "per_device_train_batch_size": 4,
        "num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    return resolve(None, [word for key, value in flags.items() for word in (f"--{key}", str(value))])


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs stages in this process instead of one of their own; the names of those that were run."""
    done: list[str] = []

    def run(command: list[str], log: Path) -> int:
        assert command[1:3] == ["-m", "orpo.compare.stage"]
        done.append(Path(command[3]).parent.name)
        return stage.main(command[3])

    monkeypatch.setattr(process, "run_process", run)
    return done


def _quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """A whole comparison with two seeds: its folder, comparison.json and the stages in the order they were run."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        done: list[str] = []

        def run(command: list[str], log: Path) -> int:
            done.append(Path(command[3]).parent.name)
            return stage.main(command[3])

        patch.setattr(process, "run_process", run)
        options = CompareOptions(seeds=(1, 2), num_points=2, output=str(folder), **GRID)
        told: list[str] = []
        compare(config, options, told.append)
        (folder / "told.txt").write_text("\n".join(told))
    return folder, json.loads((folder / "comparison.json").read_text()), done


def test_every_stage_says_which_it_is_and_how_long_the_rest_will_take(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, _, done = finished
    lines = [line for line in (folder / "told.txt").read_text().splitlines() if line.startswith("stage ")]
    assert [line.split()[1:4] for line in lines] == [[str(number), "of", f"{len(done)}:"] for number in range(1, len(done) + 1)]
    assert all(line.endswith(" left") for line in lines[2:])


def test_every_method_gets_the_grid_and_every_seed(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, facts, done = finished
    assert facts["status"] == "complete"
    assert list(facts["methods"]) == ["sft", "sft+dpo", "simpo", "orpo"]
    assert [len(method["trials"]) for method in facts["methods"].values()] == [2, 4, 2, 4]
    assert all([run["seed"] for run in method["runs"]] == [1, 2] for method in facts["methods"].values())
    assert len(done) == len(set(done)), "a stage was run twice"
    # The start, 2 + 4 + 2 + 4 trials of which the chosen ones are the first seed's runs, and one run per method for the second.
    assert len(done) == 1 + 12 + 4
    for method in facts["methods"].values():
        best = max(
            method["trials"], key=lambda trial: (trial["validation"]["accuracy"]["value"], trial["validation"]["log_odds_ratio"]["value"])
        )
        assert method["options"] == best["options"] == method["runs"][0]["options"]
        assert all((folder / run["folder"] / "model").is_dir() for run in method["runs"])
    kept = [path.parent.name for path in folder.glob("runs/*/model")]
    assert len(kept) == 8, "weights of trials that nothing starts from are removed"


def test_parts_share_no_prompt_and_test_rows_are_in_no_stage(config: RunConfig, finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    data = stage.load_comparison_data(config, config.training_args(), Split(), _quiet)
    parts = [{group.prompt_ids.tobytes() for group in part} for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == NUM_ROWS
    assert finished[1]["data"]["num_train"] == len(data.train)
    assert min(map(len, parts)) > 0


def test_passes_are_those_of_the_methods(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    facts = finished[1]
    pairs = 2 * facts["data"]["num_train"]  # two epochs
    stages = {name: method["runs"][0]["stages"] for name, method in facts["methods"].items()}
    assert [one["objective"] for one in stages["sft+dpo"]] == ["sft", "dpo"]
    (sft,), (orpo,), dpo = stages["sft"], stages["orpo"], stages["sft+dpo"][1]
    assert (sft["forward_passes"], sft["backward_passes"]) == (pairs, pairs)
    assert (orpo["forward_passes"], orpo["backward_passes"]) == (2 * pairs, 2 * pairs)
    # The reference sees every answer once, not once per epoch.
    assert (dpo["forward_passes"], dpo["backward_passes"]) == (2 * pairs + pairs, 2 * pairs)
    assert dpo["reference_tokens"] * 2 == dpo["forward_tokens"] == orpo["forward_tokens"]
    assert sft["forward_tokens"] < orpo["forward_tokens"]
    assert sft["flops"] < orpo["flops"] < stages["sft+dpo"][0]["flops"] + dpo["flops"]
    assert all(one["train_s"] > 0 and one["peak_bytes"] > 0 for run in stages.values() for one in run)


def test_a_run_equals_orpo_train(config: RunConfig, finished: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    """Measuring changes nothing: the same rows, rate and seed through `orpo train` give the same weights, bit for bit."""
    folder, facts, _ = finished
    data = stage.load_comparison_data(config, config.training_args(), Split(), _quiet)
    rows = [json.loads(line) for line in Path(config["dataset_name"]).read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(rows[group.where.row]) + "\n" for group in data.train))
    run = facts["methods"]["orpo"]["runs"][1]
    flags = [f"--{key}={value}" for key, value in {**run["options"], "seed": run["seed"], "num_train_epochs": 2}.items()]
    common = [f"--{key}={config[key]}" for key in ("model_name_or_path", "per_device_train_batch_size", "use_cpu", "bf16", "report_to")]
    argv = [
        "train",
        *common,
        *flags,
        f"--dataset_name={tmp_path / 'train.jsonl'}",
        f"--output_dir={tmp_path / 'run'}",
        "--save_strategy=no",
    ]
    assert main(argv) == 0
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder / run["folder"], tmp_path / "run"))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_every_stage_goes_through_the_shared_engine(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    """DPO's too, whose objective cannot be computed before the reference's log-probabilities are there."""
    engines = {path.parent.name: json.loads(path.read_text())["engine"] for path in finished[0].glob("runs/*/run.json")}
    assert any(name.startswith("sft+dpo") for name in engines)
    assert set(engines.values()) == {"shared"}


def test_a_stage_that_is_killed_from_outside_is_told_as_that(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("training     8 steps\n")
    with pytest.raises(UserError, match="killed from outside(.|\n)*8 steps(.|\n)*max_tokens_per_microbatch"):
        process.raise_for(-signal.SIGKILL, "sft, trial", log)


def test_curves_run_through_both_stages(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    curve = finished[1]["methods"]["sft+dpo"]["runs"][0]["curve"]
    assert [point["stage"] for point in curve] == sorted(point["stage"] for point in curve)
    assert {point["stage"] for point in curve} == {0, 1}
    tokens = [point["tokens"] for point in curve]
    assert tokens[0] == 0
    assert tokens == sorted(tokens)
    # The DPO stage begins with the weights that the SFT stage ended with.
    last, first = [point for point in curve if point["stage"] == 0][-1], next(point for point in curve if point["stage"] == 1)
    assert first["chosen_logp"] == pytest.approx(last["chosen_logp"], abs=1e-5)
    assert [bool(run["curve"]) for run in finished[1]["methods"]["orpo"]["runs"]] == [True, False]  # the first seed's alone


def test_verdicts_claims_and_sweep_are_there(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    facts = finished[1]
    assert {(one["first"], one["second"]) for one in facts["verdicts"]} == {
        ("orpo", "sft"), ("orpo", "sft+dpo"), ("orpo", "simpo"), ("sft", "sft+dpo"), ("sft", "simpo"), ("sft+dpo", "simpo"),
    }  # fmt: skip
    passes = next(one for one in facts["claims"] if "halves" in one["claim"])
    assert passes["holds"] is False, "two epochs with the reference once: 4 of 6 passes, not half"
    assert np.shape(facts["sweep"]["orpo"]["margin"]) == (2, 2)
    assert facts["start"]["sha256"]


def test_the_same_call_again_runs_nothing(
    config: RunConfig, finished: tuple[Path, dict[str, Any], list[str]], processes: list[str]
) -> None:
    folder, before, _ = finished
    again = compare(config, CompareOptions(seeds=(1, 2), num_points=2, output=str(folder), **GRID), _quiet)
    assert processes == []
    assert again["verdicts"] == before["verdicts"]


def test_another_seed_runs_only_itself(
    config: RunConfig, finished: tuple[Path, dict[str, Any], list[str]], processes: list[str], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "moved"  # and a folder may be moved
    shutil.copytree(finished[0], copy)
    grid: dict[str, Any] = {**GRID, "strengths": {"orpo": GRID["strengths"]["orpo"]}}
    facts = compare(config, CompareOptions(methods=("sft", "orpo"), seeds=(1, 3), num_points=2, output=str(copy), **grid), _quiet)
    assert [name.split("-")[0] for name in processes] == ["sft", "orpo"]
    assert [run["seed"] for run in facts["methods"]["orpo"]["runs"]] == [1, 3]


def test_a_sweep_widens_the_map_and_not_the_choice(
    config: RunConfig, processes: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparison, "SWEEP_RATES", (1.0,))
    monkeypatch.setitem(KINDS, "orpo", replace(KINDS["orpo"], sweep=(1.0,)))
    options = CompareOptions(
        methods=("orpo",), learning_rates=(1e-6,), strengths={"orpo": (0.1,)}, sweep=True, output=str(tmp_path), num_points=0
    )
    facts = compare(config, options, _quiet)
    assert np.shape(facts["sweep"]["orpo"]["accuracy"]) == (2, 2)
    assert len(facts["methods"]["orpo"]["trials"]) == 4
    assert facts["methods"]["orpo"]["options"] == {"learning_rate": 1e-6, "orpo_alpha": 0.1}, "others would have been better"


def test_every_stage_prints_the_date_of_the_first_start(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a template that prints the second, rows of another start would be other rows."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ strftime_now('%H:%M:%S') }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "clock.jinja").write_text(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    dated = replace(config, values={**config.values, "chat_template": str(tmp_path / "clock.jinja"), "max_steps": 1})
    dated = replace(dated, origins={**config.origins, "chat_template": "--chat_template", "max_steps": "--max_steps"})
    done: list[str] = []

    def run(command: list[str], log: Path) -> int:
        begun = int(time.time())
        while int(time.time()) == begun:
            time.sleep(0.05)
        done.append(Path(command[3]).parent.name)
        return stage.main(command[3])

    monkeypatch.setattr(process, "run_process", run)
    options = CompareOptions(methods=("sft",), learning_rates=(1e-3,), num_points=0, output=str(tmp_path / "out"))
    first = compare(dated, options, _quiet)
    again = compare(dated, replace(options, methods=("sft", "orpo"), strengths={"orpo": (0.5,)}), _quiet)
    assert [name.partition("-")[0] for name in done] == ["start", "sft", "orpo"]
    assert first["data"]["date"] == again["data"]["date"] is not None
    for path in (tmp_path / "out" / "runs").glob("*/run.json"):
        assert json.loads(path.read_text())["data"]["template"]["date"] == first["data"]["date"]
    assert sum(1 for _ in (tmp_path / "out" / "runs").glob("*/run.json")) == 2


def test_other_rows_are_refused(config: RunConfig, finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    options = CompareOptions(seeds=(1, 2), output=str(finished[0]), split=Split(max_train_rows=8))
    with pytest.raises(UserError, match="on other rows"):
        compare(config, options, _quiet)


def test_trials_on_fewer_rows_are_not_the_runs(config: RunConfig, processes: list[str], tmp_path: Path) -> None:
    options = CompareOptions(methods=("orpo",), learning_rates=(1e-2,), output=str(tmp_path), split=Split(tune_rows=8), num_points=0)
    facts = compare(config, options, _quiet)
    assert len(processes) == 1 + 2 + 1
    trained = json.loads((tmp_path / "runs" / processes[1] / "run.json").read_text())["data"]
    final = json.loads((tmp_path / facts["methods"]["orpo"]["runs"][0]["folder"] / "run.json").read_text())["data"]
    assert trained["fingerprint"] != final["fingerprint"]
    assert facts["methods"]["orpo"]["runs"][0]["stages"][0]["num_pairs"] == 2 * facts["data"]["num_train"]


def test_adapters_go_through_both_stages(config: RunConfig, processes: list[str], tmp_path: Path) -> None:
    lora = RunConfig({**config.values, "use_peft": True, "lora_r": 4}, {**config.origins, "use_peft": "--use_peft", "lora_r": "--lora_r"})
    options = CompareOptions(
        methods=("sft+dpo",), learning_rates=(1e-2,), strengths={"sft+dpo": (0.1,)}, output=str(tmp_path), num_points=0
    )
    facts = compare(lora, options, _quiet)
    assert (tmp_path / facts["methods"]["sft+dpo"]["runs"][0]["folder"] / "adapter").is_dir()
    sft, dpo = facts["methods"]["sft+dpo"]["runs"][0]["stages"]
    assert sft["num_pairs"] == dpo["num_pairs"]
    assert facts["methods"]["sft+dpo"]["change"]["margin"]["value"] != 0


def test_dpo_starts_at_log_2(config: RunConfig, processes: list[str], tmp_path: Path) -> None:
    """The reference is the very start of the stage, so the first step's loss is -log sigmoid(0)."""
    options = CompareOptions(methods=("dpo",), learning_rates=(1e-2,), strengths={"dpo": (0.1,)}, output=str(tmp_path), num_points=0)
    facts = compare(config, options, _quiet)
    metrics = (tmp_path / facts["methods"]["dpo"]["runs"][0]["folder"] / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("orpo", "ppo")}, "ppo"),
        ({"methods": ()}, "none is named"),
        ({"methods": ("orpo", "orpo")}, "named twice"),
        ({"seeds": (1, 1)}, "different"),
        ({"learning_rates": (0.0,)}, "positive"),
        ({"strengths": {"sftt": (1.0,)}}, "sftt is not compared"),
        ({"split": Split(test_fraction=1.0)}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compare(config, CompareOptions(**{"output": str(tmp_path), **changes}), _quiet)


def test_a_stage_that_fails_says_why(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], log: Path) -> int:
        log.write_text("step 3: the loss is nan\n")
        return EXIT_GUARD

    monkeypatch.setattr(process, "run_process", fail)
    with pytest.raises(GuardStop, match="the loss is nan"):
        compare(config, CompareOptions(output=str(tmp_path)), _quiet)


def _arguments(config: RunConfig, folder: Path) -> list[str]:
    keys = ("model_name_or_path", "dataset_name", "per_device_train_batch_size", "learning_rate", "use_cpu", "bf16", "report_to")
    given = [word for key in keys for word in (f"--{key}", str(config[key]))]
    return [*given, "--methods", "sft,orpo", "--learning_rates", "1e-2", "--strengths", "orpo=1", "--output", str(folder), "--json"]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_signal_stops_it_and_the_same_command_goes_on(config: RunConfig, tmp_path: Path) -> None:
    """In processes of their own, as users run it."""
    command = [sys.executable, "-m", "orpo", "compare", *_arguments(config, tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len(list(tmp_path.glob("runs/*/stage.json"))) == 1)  # the start is measured, SFT begins
    _wait_for(lambda: len(list(tmp_path.glob("runs/*/spec.json"))) == 2)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, errors
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/stage.json")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert facts["status"] == "complete"
    assert set(facts["methods"]) == {"sft", "orpo"}
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    assert "orpo report" in finished.stderr


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stage_is_a_command_of_its_own(tmp_path: Path) -> None:
    """`python -m orpo.compare.stage SPEC` does what the comparison does with it, so that a stage can be run again by hand."""
    source = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[2])}
    command = [sys.executable, "-m", "orpo.compare.stage", str(tmp_path / "spec.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=source)
    assert done.returncode == 2
    assert "spec.json: cannot be read" in done.stderr
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.slow
def test_several_processes_train_what_one_trains(config: RunConfig, tmp_path: Path) -> None:
    """Two processes with half the rows each: the same stages by the same command, the same scores, costs and curves; one output."""
    own = {"per_device_train_batch_size", "output_dir"}
    keys = [
        word for key, origin in config.origins.items() if origin != "default" and key not in own for word in (f"--{key}", str(config[key]))
    ]
    found = {}
    for number in (1, 2):
        words = [
            *keys,
            "--per_device_train_batch_size",
            str(4 // number),
            "--num_processes",
            str(number),
            "--output",
            str(tmp_path / str(number)),
        ]
        grid = ["--methods", "sft+dpo", "--learning_rates", "1e-2", "--strengths", "sft+dpo=0.1", "--points", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "orpo", "compare", *words, *grid],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("stage ") == 3
        found[number] = json.loads((tmp_path / str(number) / "comparison.json").read_text())
    one, two = (facts["methods"]["sft+dpo"] for facts in (found[1], found[2]))
    for name in ("accuracy", "margin", "chosen_logp", "rejected_logp"):
        assert two["summary"][name]["value"] == pytest.approx(one["summary"][name]["value"], abs=1e-5)
    spent_one, spent_two = (facts["runs"][0]["totals"] for facts in (one, two))
    for name in ("num_steps", "num_pairs", "reference_tokens"):
        assert spent_two[name] == spent_one[name]
    # Of 25 rows the last step has one: the process without a row computes a filler, in two epochs of two stages.
    for name, most in (("forward_passes", 6), ("backward_passes", 6)):
        assert spent_one[name] < spent_two[name] <= spent_one[name] + most


def test_what_several_processes_spent_is_one_cost() -> None:
    costs = [
        measure.Cost(2, 4, 10, 10, 5, 8, 8, 100, 1.0, 0.5, 7, False, [4, 10]),
        measure.Cost(2, 3, 9, 9, 4, 6, 6, 90, 2.0, 0.1, 9, False, [5, 9]),
    ]
    assert measure.cost_of_all(costs) == measure.Cost(2, 7, 19, 19, 9, 14, 14, 190, 2.0, 0.5, 9, False, [9, 19])
    assert measure.cost_of_all(costs[:1]) == costs[0]


def test_sharded_stages_are_refused(config: RunConfig, tmp_path: Path) -> None:
    sharded = replace(config, values={**config.values, "parallelism": "fsdp2"})
    with pytest.raises(UserError, match="not sharded"):
        compare(sharded, CompareOptions(num_processes=2, output=str(tmp_path / "out")), _quiet)
