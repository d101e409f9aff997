"""Objectives: the package's own from YAML and flags, and one that a single file brings from outside, trained, resumed and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo import ORPOConfig
from orpo.cli import main
from orpo.compare.methods import method_of
from orpo.errors import UserError
from orpo.objective import DPO, KINDS, ORPO, SFT, SimPO
from orpo.system import plugins

DOCUMENT = Path(__file__).parents[2] / "docs" / "objectives.md"
NUM_ROWS = 12


@pytest.fixture(autouse=True)
def only_what_this_test_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Objectives are known to a whole process; a test leaves none behind."""
    before = dict(KINDS)
    monkeypatch.setattr(plugins, "_LOADED", {})
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the document's plugin, rows and a configuration."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ipo.py").write_text(plugin_text())
    configure(tmp_path, {"model_name_or_path": str(model_folder), "dataset_name": "rows.jsonl", "output_dir": "run"})
    return tmp_path


def plugin_text() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return block


def configure(home: Path, options: dict[str, Any]) -> None:
    quick = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump({**quick, **options}))


def run_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def training_logs(folder: Path) -> list[dict[str, Any]]:
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [log for log in logs if "loss" in log]


# ---- the registry and the configuration ------------------------------------------------------------------------------------------------


def test_the_configurations_own_fields_have_the_registrys_defaults() -> None:
    config = ORPOConfig()
    assert all(getattr(config, option.key) == option.default for option in KINDS["orpo"].options)
    assert {type(kind.build({})) for kind in KINDS.values()} == {ORPO, SFT, DPO, SimPO}


def test_options_are_read_as_attributes_and_survive_copies() -> None:
    import copy
    import dataclasses
    import pickle

    config = ORPOConfig(objective="simpo", simpo_beta=4.0)
    for again in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, seed=1)):  # noqa: S301
        assert (again.simpo_beta, again.simpo_gamma) == (4.0, None)
        assert again.to_dict()["objective_options"] == {"simpo_beta": 4.0}
    assert SimPO(beta=4.0).margin == 2.0, "the target margin follows beta unless it is given"
    with pytest.raises(AttributeError, match="simpo_delta"):
        _ = config.simpo_delta


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "simpoo"}, r"objective: found the text 'simpoo'(.|\n)*orpo, sft, dpo, simpo(.|\n)*did you mean 'simpo'"),
        ({"objective": "simpo", "simpo_beta": 0.0}, r"simpo_beta: found 0.0(.|\n)*more than 0"),
        ({"objective": "simpo", "simpo_beta": float("nan")}, r"simpo_beta: found nan"),
        ({"objective": "simpo", "simpo_gamma": "wide"}, r"simpo_gamma: found the text 'wide'(.|\n)*a number or nothing"),
        ({"objective": "simpo", "simpo_gama": 1.0}, r"simpo_gama(.|\n)*did you mean 'simpo_gamma'"),
        ({"objective": "simpo", "objective_options": {"simpo_betta": 1.0}}, r"no option 'simpo_betta'(.|\n)*did you mean 'simpo_beta'"),
        ({"orpo_beta": 0.0}, r"orpo_beta: found 0.0(.|\n)*more than 0"),
    ],
    ids=str,
)
def test_options_are_checked_wherever_they_are_written(options: dict[str, Any], said: str, home: Path, capfd: Any) -> None:
    with pytest.raises(UserError) as caught:
        ORPOConfig(**options)
    assert re.search(said, str(caught.value)), caught.value
    if "objective_options" in options:
        return  # flat keys are what a file and flags have
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["train", "run.yaml", *flags]) == 2
    told = capfd.readouterr().err
    assert f"--{list(options)[-1]}" in told
    for part in re.findall(r"did you mean '\w+'|more than 0", said):
        assert part in told


def test_an_option_of_another_objective_is_told_to_have_no_effect(home: Path, capfd: Any) -> None:
    with pytest.warns(UserWarning, match="simpo_beta has no effect: the objective is orpo"):
        ORPOConfig(simpo_beta=3.0)
    assert main(["train", "run.yaml", "--objective", "simpo", "--beta", "0.3"]) == 0
    assert capfd.readouterr().err.count("orpo_alpha has no effect: the objective is simpo, whose options are simpo_beta, simpo_gamma") == 1


# ---- the package's own -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "flags", "formula"),
    [
        ("sft", [], "next-token loss (prompt and chosen answer)"),
        ("simpo", ["--simpo_beta", "3"], "-log sigmoid of (3 × the difference of the answers' mean log-probabilities - 1.5)"),
        ("orpo", ["--orpo_alpha", "0.5"], "next-token loss (prompt and chosen answer) + 0.5 × odds-ratio term (orpo_beta 1)"),
    ],
)
def test_objectives_without_a_reference_are_trained_from_flags(
    objective: str, flags: list[str], formula: str, home: Path, capfd: Any
) -> None:
    assert main(["train", "run.yaml", "--objective", objective, *flags]) == 0
    facts, logs = run_facts(home / "run"), training_logs(home / "run")
    assert (facts["objective"]["name"], facts["objective"]["formula"]) == (objective, formula)
    assert ("rewards/margins" in logs[0]) == (objective != "sft"), "SFT has no implicit reward"
    if objective == "sft":
        assert logs[0]["loss"] == pytest.approx(logs[0]["nll_loss"])
    if objective == "simpo":
        margin = logs[0]["logps/chosen"] - logs[0]["logps/rejected"]
        assert logs[0]["rewards/margins"] == pytest.approx(3 * margin, rel=1e-5)
    assert main(["report", "run"]) == 0
    assert KINDS[objective].label in (home / "run" / "README.md").read_text()
    capfd.readouterr()
    assert main(["eval", "run", "--data", "rows.jsonl"]) == 0


def test_dpo_is_refused_with_the_reason(home: Path, capfd: Any) -> None:
    assert main(["train", "run.yaml", "--objective", "dpo"]) == 2
    told = capfd.readouterr().err
    assert "--objective: found 'dpo', which needs the log-probability of every answer under a frozen reference" in told
    assert "orpo compare --methods sft+dpo" in told
    assert not (home / "run").exists()


def test_the_trainer_refuses_pairs_without_a_reference(tmp_path: Path) -> None:
    from randomgroups import random_groups
    from trainerruns import make_trainer

    trainer = make_trainer(tmp_path, random_groups(4, seed=0), objective="dpo", max_steps=1)
    with pytest.raises(UserError, match="DPO needs the log-probability(.|\n)*reference_logp_sums"):
        trainer.train()


def test_the_list_names_every_objective_and_option(home: Path, capsys: Any) -> None:
    assert main(["train", "--objectives", "--plugins", "ipo.py"]) == 0
    shown = capsys.readouterr().out
    for kind in KINDS.values():
        assert f"  {kind.name} " in shown
        assert all(f"--{option.key} " in shown for option in kind.options)
    assert "--ipo_tau" in shown


# ---- one from outside --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["file", "flags"])
def test_a_file_from_outside_is_trained_from_yaml_and_from_flags(way: str, home: Path, model_folder: Path, capfd: Any) -> None:
    own: dict[str, Any] = {"plugins": ["ipo.py"], "objective": "ipo", "ipo_tau": 0.25}
    given = {"model_name_or_path": str(model_folder), "dataset_name": "rows.jsonl", "output_dir": "run"}
    configure(home, {**given, **own} if way == "file" else given)
    flags = [] if way == "file" else ["--plugins", "ipo.py", "--objective", "ipo", "--ipo_tau", "0.25"]
    assert main(["train", "run.yaml", *flags]) == 0
    assert "IPO (ipo_tau 0.25)" in capfd.readouterr().err
    facts, logs = run_facts(home / "run"), training_logs(home / "run")
    margin = logs[0]["logps/chosen"] - logs[0]["logps/rejected"]
    assert logs[0]["loss"] > 0
    assert logs[0]["loss"] == pytest.approx((margin - 2) ** 2, rel=0.2), "the mean square of a margin near its mean"
    assert facts["objective"]["options"] == {"ipo_tau": 0.25}
    assert facts["configuration"]["ipo_tau"]["value"] == 0.25
    (plugin,) = facts["plugins"]
    assert plugin["path"] == str(home / "ipo.py")
    assert main(["report", "run"]) == 0
    assert "squared distance of the margin to 1 / (2 × 0.25)" in (home / "run" / "README.md").read_text()


def test_its_options_are_checked_like_any_other(home: Path, capfd: Any) -> None:
    assert main(["train", "run.yaml", "--plugins", "ipo.py", "--objective", "ipo", "--ipo_tau", "-1"]) == 2
    assert re.search(r"--ipo_tau: found -1.*\n.*more than 0", capfd.readouterr().err)
    assert main(["train", "run.yaml", "--plugins", "ipo.py", "--objective", "ipo", "--ipo_taw", "1"]) == 2
    assert "did you mean 'ipo_tau'" in capfd.readouterr().err
    assert main(["train", "run.yaml", "--plugins", "ip.py", "--objective", "ipo"]) == 2
    told = capfd.readouterr().err
    assert "--plugins: ip.py does not exist" in told
    assert "did you mean ipo.py?" in told


def test_a_run_resumes_with_the_same_options_and_the_same_code(home: Path, capfd: Any) -> None:
    from randomgroups import random_groups
    from trainerruns import make_trainer

    def trainer(**options: Any) -> Any:
        own = {"plugins": ["ipo.py"], "objective": "ipo", "save_strategy": "steps", "save_steps": 1, "max_steps": 2, **options}
        return make_trainer(home / "python", random_groups(8, seed=0), **own)

    first = trainer(ipo_tau=0.25)
    first.train()
    assert first.training_objective.tau == 0.25
    with pytest.raises(UserError, match=r"objective_options.ipo_tau: 0.25 -> 0.5"):
        trainer(ipo_tau=0.5).train(resume_from_checkpoint=True)
    trainer(ipo_tau=0.25).train(resume_from_checkpoint=True)
    (home / "ipo.py").write_text(plugin_text().replace("** 2", "** 4"))
    plugins._LOADED.clear()  # as in another process
    with pytest.raises(UserError, match="objective_code"):
        trainer(ipo_tau=0.25).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_it_is_compared_with_the_others(home: Path, capfd: Any) -> None:
    words = ["--plugins", "ipo.py", "--methods", "ipo", "--strengths", "ipo=0.5", "--learning_rates", "0.01", "--points", "1"]
    words += ["--test_fraction", "0.3", "--validation_fraction", "0.4"]
    assert main(["compare", "run.yaml", *words, "--max_steps", "1", "--output", "comparison", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {name: method["label"] for name, method in found["methods"].items()} == {"ipo": "IPO"}
    assert found["methods"]["ipo"]["options"] == {"learning_rate": 0.01, "ipo_tau": 0.5}
    in_turn = method_of("sft+ipo")
    assert (in_turn.label, in_turn.stages, in_turn.strength_name, in_turn.strengths) == ("SFT + IPO", ("sft", "ipo"), "ipo_tau", (0.1, 0.5))
    assert main(["compare", "run.yaml", "--methods", "sft,ippo"]) == 2
    assert "did you mean 'ipo'" in capfd.readouterr().err


def test_asking_a_strangers_run_loads_no_code(home: Path, capfd: Any) -> None:
    assert main(["train", "run.yaml", "--plugins", "ipo.py", "--objective", "ipo", "--ipo_tau", "0.25"]) == 0
    (home / "ipo.py").write_text("raise SystemExit('the code of a run folder was run')\n")
    plugins._LOADED.clear()
    del KINDS["ipo"]
    assert main(["report", "run"]) == 0
    assert main(["eval", "run", "--data", "rows.jsonl"]) == 0
    assert plugins._LOADED == {}


# ---- what cannot be registered -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('register("ipo"', 'register("orpo"'), "the name is taken by orpo.objective.known.ORPO"),
        (('register("ipo"', 'register("I P O"'), "the name is malformed"),
        (("option(0.5,", "field(metadata=dict("), "SyntaxError"),
        ((' = option(0.5, help="Strength; a small one asks for a large margin.", more_than=0)', ""), "tau has no default"),
        (("@dataclass(frozen=True)\n", ""), "IPO is no dataclass"),
        (('strength="tau"', 'strength="taw"'), "strength is 'taw'"),
        (('{"preference": ((margin_B', '{"preference": (0 * index.chosen_B + (margin_B'), "the objective gave"),
    ],
    ids=lambda value: value[1][:30] if isinstance(value, tuple) else None,
)
def test_an_objective_that_cannot_be_says_why(change: tuple[str, str], said: str, home: Path, capfd: Any) -> None:
    text = plugin_text()
    assert change[0] in text
    changed = text.replace(*change)
    if said == "the objective gave":
        changed = changed.replace(".sum() / (index.num_pairs or 1.0)", "")
    (home / "ipo.py").write_text(changed)
    assert main(["train", "run.yaml", "--plugins", "ipo.py", "--objective", "ipo"]) == 2
    assert said in " ".join(capfd.readouterr().err.split())
