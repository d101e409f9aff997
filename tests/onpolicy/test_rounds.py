"""`orpo train --rounds N`: rounds that start from each other's weights, end by themselves, and go on wherever they were killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.forked import Zygote
from orpo.cli import main

JOB = "onpolicy.roundjobs:train"
CHECKS = """
def vowels(prompt, answer):
    return sum(letter in "aeiou" for letter in answer)

def same(prompt, answer):
    return 1.0

def shrinking(prompt, answer):
    return -len(answer)
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rounds")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "checks.py").write_text(CHECKS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"How many are {n} and {n}?"}) + "\n" for n in range(16)))
    return {
        "model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "prompts.jsonl"), "per_device_train_batch_size": 4,
        "num_train_epochs": 1, "eval_fraction": 0.3, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "learning_rate": 1e-3, "seed": 1,
        "on_policy": {
            "verify": f"{folder / 'checks.py'}:vowels", "num_samples": 3, "max_new_tokens": 6, "cut": "keep", "batch_size": 16,
            "old_share": 0.25, "patience": 9, "min_distinct": 0.0, "max_drift": 99.0,
        },
    }  # fmt: skip


class Rounds:
    """One configuration with rounds, run again and again."""

    def __init__(self, forks: Zygote, folder: Path, options: dict[str, Any]) -> None:
        self._forks, self.run, self.log = forks, folder / "run", folder / "log"
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump({**options, "output_dir": str(self.run)}))

    def __call__(self, **arguments: Any) -> int:
        self.log.unlink(missing_ok=True)
        return self._forks.run(JOB, self.log, config=str(self.config), **arguments)

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.run / "rounds.json").read_text())

    @property
    def result(self) -> dict[str, Any]:
        """Everything that rounds leave, without places."""
        files = sorted(self.run.glob("round-*/*.jsonl")) + sorted(self.run.glob("round-*/model/model.safetensors"))
        contents = {str(path.relative_to(self.run)): path.read_bytes() for path in files if path.name != "metrics.jsonl"}
        contents = {name: data.replace(str(self.run).encode(), b"RUN") for name, data in contents.items()}
        rounds = [{key: value for key, value in one.items() if key != "model"} for one in self.facts["rounds"]]
        return {"files": contents, "rounds": rounds, "start": self.facts["start"]}


@pytest.fixture(scope="module")
def whole(forks: Zygote, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    rounds = Rounds(forks, tmp_path_factory.mktemp("whole"), options)
    assert rounds() == 0, rounds.log.read_text()
    return rounds


def test_rounds_follow_each_other(whole: Rounds) -> None:
    facts = whole.facts
    assert facts["status"] == "complete"
    assert [one["number"] for one in facts["rounds"]] == [1, 2]
    assert facts["rounds"][1]["model"] == str(whole.run / "round-1")
    first, second = ((whole.run / f"round-{number}") for number in (1, 2))
    config = json.loads((second / "run.json").read_text())["configuration"]
    assert config["model_name_or_path"]["value"] == str(first / "model")
    assert config["seed"]["value"] == 2
    pairs, rows = ((second / name).read_text().splitlines() for name in ("pairs.jsonl", "rows.jsonl"))
    assert rows[: len(pairs)] == pairs
    assert set(rows[len(pairs) :]) <= set((first / "pairs.jsonl").read_text().splitlines())
    assert len(rows) - len(pairs) == round(len(pairs) / 3)
    prompts = {json.loads(line)["prompt"] for folder in (first, second) for line in (folder / "rows.jsonl").read_text().splitlines()}
    assert facts["num_held_out"] + facts["num_prompts"] == 16
    assert len(prompts) <= facts["num_prompts"]
    before = whole.result
    assert whole() == 0
    assert "nothing was done" in whole.log.read_text()
    assert whole.result == before


@pytest.mark.slow
def test_more_rounds_are_added(whole: Rounds, forks: Zygote, options: dict[str, Any], tmp_path: Path) -> None:
    shorter = Rounds(forks, tmp_path, options)
    assert shorter(rounds=1) == 0
    assert shorter(rounds=2) == 0
    assert shorter.result == whole.result


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("rounds.json", 4),  # round 1 trained, not yet on record
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in [
                *(
                    ("answers.jsonl", 1),
                    ("answers.jsonl", 30),
                    ("scores.jsonl", 3),
                    ("scores.jsonl", 20),
                    ("pairs.jsonl", 1),
                    ("result.json", 1),
                    ("rows.jsonl", 1),
                ),
                *(("run.json", 1), ("run.json", 3), ("model", 1), ("answers.jsonl", 60), ("pairs.jsonl", 2), ("rows.jsonl", 2)),
                *(("rounds.json", 1), ("rounds.json", 2), ("rounds.json", 3), ("rounds.json", 5), ("candidates.jsonl", 2)),
            ]
        ),
    ],
)
def test_killed_anywhere_the_same_command_goes_on(
    forks: Zygote, options: dict[str, Any], whole: Rounds, tmp_path: Path, name: str, time: int
) -> None:
    rounds = Rounds(forks, tmp_path, options)
    assert rounds(die_at=name, time=time) == -signal.SIGKILL, rounds.log.read_text()
    answers = sorted(rounds.run.rglob("answers.jsonl"))
    kept = {path: path.read_bytes() for path in answers}
    assert rounds() == 0, rounds.log.read_text()
    assert all(path.read_bytes().startswith(data) for path, data in kept.items())
    for path in rounds.run.rglob("answers.jsonl"):
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert len(keys) == len(set(keys)), "sampled twice"
    assert rounds.result == whole.result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"patience": 1, "verify": "same", "length": True, "weights": {"length": 0.0001}, "max_similarity": 1.0}, "no longer rises"),
        ({"min_distinct": 1.0, "temperature": 0.05}, "lost their diversity"),
        ({"max_drift": 1.0001}, "drift in length"),
    ],
)
def test_rounds_end_by_themselves(forks: Zygote, options: dict[str, Any], tmp_path: Path, block: dict[str, Any], words: str) -> None:
    checks = options["on_policy"]["verify"].rpartition(":")[0]
    block = {**block, **({"verify": f"{checks}:{block['verify']}"} if "verify" in block else {})}
    rounds = Rounds(
        forks, tmp_path, {**options, "learning_rate": 1e-9 if "patience" in block else 1e-2, "on_policy": {**options["on_policy"], **block}}
    )
    assert rounds(rounds=5) == 0, rounds.log.read_text()
    assert words in rounds.facts["stopped_because"]
    assert len(rounds.facts["rounds"]) < 5
    assert rounds(rounds=5) == 0
    assert "nothing was done" in rounds.log.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"on_policy": None, "rounds": 2}, "rounds need to know"),
        ({"rounds": 0}, "rounds: found 0"),
        ({"on_policy": {"verifi": "a.py:b"}}, "did you mean 'verify'?"),
        ({"on_policy": {"num_samples": "four"}}, "on_policy: num_samples"),
        ({"on_policy": {"old_share": 1.0}}, "on_policy: old_share"),
        ({"on_policy": {"num_samples": 4}}, "a scorer: verify"),
        ({"on_policy": {"verify": "gone.py:f"}}, "no such file"),
        ({"dataset_name": "gone.jsonl"}, "gone.jsonl"),
        ({"eval_fraction": 0.0001}, "one side would be empty"),
    ],
)
def test_what_cannot_be_done_is_said(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**options, "output_dir": str(tmp_path / "run"), **change}))
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split()), said
    assert "Traceback" not in said


def test_the_report_shows_the_rounds(whole: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(whole.run)]) == 0
    page = (whole.run / "report.html").read_text()
    assert "Held-out answers, round by round" in page
    assert page.count("round 2") >= 2
    assert f"{whole.facts['rounds'][1]['held_out']['value']:.3f}" in page
    assert main(["report", str(whole.run / "round-2")]) == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"rounds": 3}', '{"rounds": [null, 1, {"held_out": {"value": "<b>"}, "left_out": []}], "status": [1]}']
)
def test_damaged_rounds_are_told_or_shown(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rounds.json").write_text(content)
    assert main(["report", str(tmp_path)]) == (0 if "held_out" in content else 2)
    assert "Traceback" not in capsys.readouterr().err


def test_another_configuration_is_refused(whole: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(whole.config), "--rounds", "3", "--learning_rate", "0.5"]) == 2
    assert "holds rounds of another configuration (learning_rate)" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_are_refused_before_anything(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would do all of the rounds, into the same files; the first one says so."""
    from orpo.errors import OrpoError
    from orpo.onpolicy.rounds import run_rounds

    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OrpoError) as found:
        run_rounds(None, print, list, list)  # type: ignore[arg-type]
    assert found.value.exit_code == 2
    assert ("without --num_processes" in str(found.value)) == (rank == "0")


@pytest.mark.slow
def test_rounds_with_several_processes_end_at_once(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**options, "output_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "orpo", "train", str(path), "--rounds", "2", "--num_processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("a launcher has started 2 processes") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
