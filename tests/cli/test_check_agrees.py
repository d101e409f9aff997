"""What `orpo check` calls ready, `orpo train` runs: steps, an evaluation, a save. What cannot run is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import orpo
from cli.configurations import PACKED, QUANTIZED, changes
from faults.forked import Zygote
from orpo.models.export import export_gguf
from orpo.models.load import load_model

NUM_STEPS = 3
OK, REFUSED, GUARD = 0, 2, 3
BASE: dict[str, Any] = {
    "model_name_or_path": "tiny", "dataset_name": "rows.jsonl", "output_dir": "run", "use_cpu": True, "report_to": "none", "bf16": False,
    "max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 2,
    "eval_strategy": "steps", "eval_fraction": 0.25,
}  # fmt: skip

RECIPES = sorted((Path(orpo.__file__).parent / "recipes").glob("*.yaml"))
Agree = Callable[..., dict[str, int | None]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("agree")
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer), num_layers=1).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    _store_quantized(folder, tiny_model_factory("llama", vocab_size=len(tokenizer), num_layers=1, hidden_size=64), tokenizer)
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(150)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    return folder


def _store_quantized(folder: Path, model: Any, tokenizer: Any) -> None:
    """The base as people find it on the hub: in 4 and 8 bits, as GGUF, and in methods that are only named here."""
    export_gguf(model, tokenizer, folder / "tiny.gguf", dtype="float16")
    model.save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    for bits in (4, 8):
        stored = load_model(folder / "wide", device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8).model
        stored.save_pretrained(folder / f"tiny-{bits}bit")
        tokenizer.save_pretrained(folder / f"tiny-{bits}bit")
    config = json.loads((folder / "wide" / "config.json").read_text())
    for method in PACKED:
        shutil.copytree(folder / "wide", folder / f"tiny-{method}")
        named = {**config, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 32}}
        (folder / f"tiny-{method}" / "config.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def agree(forks: Zygote, place: Path) -> Agree:
    """Check and train the base configuration with some keys changed, in a process of its own; fails where the two disagree."""

    def run(given: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, int | None]:
        shutil.rmtree(place / "run", ignore_errors=True)
        for name in ("log", "outcome.json"):
            (place / name).unlink(missing_ok=True)
        (place / "run.yaml").write_text(yaml.safe_dump({**base, **given}))
        config, outcome = str(place / "run.yaml"), place / "outcome.json"
        forks.run("faults.checkjobs:agree", place / "log", config=config, outcome=str(outcome))
        text = (place / "log").read_text()
        assert outcome.exists(), f"{given}: the process died\n{text[-4000:]}"
        codes: dict[str, int | None] = json.loads(outcome.read_text())
        assert "This is a bug in orpo" not in text, f"{given}: {codes}\n{text[-4000:]}"
        assert "Traceback" not in text, f"{given}: {codes}\n{text[-4000:]}"
        assert codes["check"] in (OK, REFUSED), f"{given}: {codes}\n{text[-4000:]}"
        if codes["check"] == OK:
            assert codes["train"] in (OK, GUARD), f"{given}: {codes}\n{text[-4000:]}"
        return codes

    return run


def test_the_base_configuration_runs_saves_and_evaluates(agree: Agree, place: Path) -> None:
    assert agree({}) == {"check": OK, "train": OK}
    assert (place / "run" / "model" / "model.safetensors").exists()
    assert "eval_loss" in (place / "run" / "metrics.jsonl").read_text()


EASY = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(EASY, max_examples=40)
@given(changes())
def test_what_is_ready_runs(agree: Agree, given: dict[str, Any]) -> None:
    agree(given)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_what_is_ready_runs_for_many(agree: Agree, piece: int) -> None:
    """500 in ten pieces, each the same at every start: a piece that failed can be run alone (`-k "many and 7"`)."""

    @seed(piece)
    @settings(EASY, derandomize=False, max_examples=50)
    @given(changes())
    def fifty(given: dict[str, Any]) -> None:
        agree(given)

    fifty()


@pytest.mark.slow
@pytest.mark.parametrize("base", [*QUANTIZED, *(f"tiny-{method}" for method in PACKED)])
def test_a_base_that_is_stored_quantized_trains_an_adapter_or_is_refused(agree: Agree, base: str) -> None:
    whole, adapter = agree({"model_name_or_path": base}), agree({"model_name_or_path": base, "use_peft": True})
    if base in QUANTIZED:
        assert adapter == {"check": OK, "train": OK}
        assert whole["check"] == (OK if base.endswith("gguf") else REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(kind.value) for kind in OptimizerNames])
def test_every_optimizer_runs_or_is_refused(agree: Agree, name: str) -> None:
    agree({"optim": name})


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"min_lr_rate": 0.1}, {"num_decay_steps": 1}, {"num_cycles": 2}], ids=str)
@pytest.mark.parametrize("name", [str(kind.value) for kind in SchedulerType])
def test_every_schedule_runs_or_is_refused(agree: Agree, name: str, arguments: dict[str, Any]) -> None:
    agree({"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments})


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(agree: Agree, place: Path, path: Path) -> None:
    """A few steps of each on a small model and one file of rows; those that need a GPU for their four bits without them."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    small = {name: BASE[name] for name in ("model_name_or_path", "output_dir", "use_cpu", "max_steps")} | {"dataset_name": "many.jsonl"}
    if recipe.get("load_in_4bit"):
        small |= {"load_in_4bit": False, "use_peft": True}
    if policy := recipe.get("on_policy"):  # it names a function of the user's
        (place / "checks.py").write_text("def passed(prompt, answer, row):\n    return len(answer) % 2 == 0\n")
        small |= {"rounds": 1, "on_policy": {**policy, "max_new_tokens": 8}, "per_device_train_batch_size": 1}  # few end in 8 tokens
    assert agree(small, recipe) == {"check": OK, "train": OK}, (place / "log").read_text()[-3000:]
