"""Guards and signals in real runs of `ORPOTrainer`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import disks, jobs
from faults.forked import Finished, Zygote, await_text, marks, send
from orpo.checkpoint import find_newest, read_manifest, verify


@pytest.fixture(scope="module")
def uninterrupted(forks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run = tmp_path_factory.mktemp("reference") / "run"
    assert forks.run("train", run.with_suffix(".log"), run_dir=str(run)) == 0, run.with_suffix(".log").read_text()
    return Finished(run)


def _step(run: Path) -> int:
    newest = find_newest(run)
    return 0 if newest is None else read_manifest(newest).step


def _signal_at(log: Path, line: str, number: int, *, is_twice: bool = False) -> Callable[[int], None]:
    """Signal a job as soon as it has marked a line; if asked, a second time as soon as it has taken note of the first."""

    def act(pid: int) -> None:
        await_text(pid, lambda: line in marks(log))
        send(pid, number)
        if is_twice:
            await_text(pid, lambda: "send it again to leave at once" in log.read_text())
            send(pid, number)

    return act


# --- guards


@pytest.mark.parametrize("trouble", ["nan weight", "inf gradient"])
def test_bad_numbers_stop_before_the_optimizer_step_and_cost_nothing_saved(
    trouble: str, forks: Zygote, uninterrupted: Finished, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), trouble=trouble) == 3
    text = log.read_text()
    assert "GuardStop: step 5" in text
    assert "data.jsonl row" in text
    assert ("the loss is nan" in text) == (trouble == "nan weight")
    assert _step(run) == 3
    assert forks.run("train", log, run_dir=str(run)) == 0, log.read_text()
    Finished(run).assert_equals(uninterrupted)


def test_bad_steps_are_left_out_within_the_bound(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), trouble="inf gradient twice", options={"on_nonfinite": "skip"}) == 0, log.read_text()
    assert "step 5 left out (1 of at most 3)" in log.read_text()
    assert "step 6 left out (2 of at most 3)" in log.read_text()
    assert "step 7 left out" not in log.read_text()
    other = tmp_path / "other"
    assert forks.run("train", log, run_dir=str(other), trouble="inf gradient", options={"on_nonfinite": "skip"}) == 3
    assert "GuardStop: step 8" in log.read_text()
    assert "after 3 skipped steps" in log.read_text()


@pytest.mark.parametrize(
    ("trouble", "status", "text"),
    [
        ("frozen", 3, "no weight of the model is trainable"),
        ("no gradient", 3, "nothing learns: the gradient is zero"),
        ("half forgotten", 0, "trainable tensors have not changed"),
    ],
)
def test_a_run_that_cannot_learn_says_so_within_its_first_steps(
    trouble: str, status: int, text: str, forks: Zygote, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options = {"weight_decay": 0.0, "warmup_steps": 0, "logging_steps": 100}
    assert forks.run("train", log, run_dir=str(tmp_path / "run"), trouble=trouble, options=options) == status, log.read_text()
    before = log.read_text().split(text)[0]
    assert text in log.read_text()
    assert "step 12" not in before


@pytest.mark.parametrize(("alpha", "text"), [(1e-6, "this is plain fine-tuning"), (1e6, "the next-token loss is")])
def test_a_term_that_takes_no_part_is_told(alpha: float, text: str, forks: Zygote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    forks.run("train", log, run_dir=str(tmp_path / "run"), options={"orpo_alpha": alpha, "max_grad_norm": 1.0})
    assert text in log.read_text()


def test_a_last_step_on_a_remainder_is_done_and_saved(forks: Zygote, tmp_path: Path) -> None:
    """22 rows in steps of 4 are five whole steps and one of two rows."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"max_steps": -1, "num_train_epochs": 1, "save_steps": 100, "logging_steps": 1}
    assert forks.run("train", log, run_dir=str(run), options=options) == 0, log.read_text()
    assert [line["step"] for line in jobs.metrics(run) if "nll_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert _step(run) == 6


# --- signals


@pytest.mark.parametrize(
    ("line", "options", "least_step"),
    [
        ("step 5", {}, 5),
        ("evaluating", {"slow_eval_s": 0.02}, 4),
        ("saving", {"slow_save_s": 0.02}, 3),
        ("step 13", {}, 13),
    ],
    ids=["training", "evaluation", "saving", "last step but one"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_resumed_run_equals_the_uninterrupted(
    line: str, options: dict[str, Any], least_step: int, number: int, forks: Zygote, uninterrupted: Finished, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    status = forks.run("train", log, while_running=_signal_at(log, line, number), run_dir=str(run), **options)
    assert status == 128 + number, log.read_text()
    assert f"stopped by {signal.Signals(number).name}: saved" in log.read_text()
    assert _step(run) >= least_step
    assert forks.run("train", log, run_dir=str(run)) == 0, log.read_text()
    Finished(run).assert_equals(uninterrupted)


def test_a_signal_while_rows_are_prepared_leaves_with_nothing_to_save(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    status = forks.run("train", log, while_running=_signal_at(log, "preparing", signal.SIGTERM), run_dir=str(run), slow_rows_s=0.05)
    assert status == 128 + signal.SIGTERM
    assert _step(run) == 0


def test_a_second_signal_in_a_save_leaves_at_once_with_nothing_torn(forks: Zygote, uninterrupted: Finished, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    act = _signal_at(log, "saving", signal.SIGTERM, is_twice=True)
    # Each file of the save takes longer than a test may: who does not leave at once does not leave.
    status = forks.run("train", log, while_running=act, run_dir=str(run), slow_save_s=600.0)
    assert status == 128 + signal.SIGTERM
    assert _step(run) == 0
    assert any(path.name.startswith(".staging-") for path in run.iterdir())
    assert forks.run("train", log, run_dir=str(run)) == 0, log.read_text()
    Finished(run).assert_equals(uninterrupted)
    assert not any(path.name.startswith(".staging-") for path in run.iterdir())


# --- errors and memory


def test_an_error_in_a_step_tears_nothing(forks: Zygote, uninterrupted: Finished, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), trouble="exception") == 1
    assert _step(run) == 3
    assert forks.run("train", log, run_dir=str(run)) == 0, log.read_text()
    Finished(run).assert_equals(uninterrupted)


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_out_of_memory_is_advice_with_figures(error: Exception) -> None:
    from types import SimpleNamespace

    import torch

    from orpo.training.runner import explain_out_of_memory

    args: Any = SimpleNamespace(device=torch.device("cpu"), microbatch_tokens=4096)
    advice = explain_out_of_memory(error, args)
    assert advice is not None
    assert "micro-batches of 4096 tokens" in str(advice)
    assert "max_tokens_per_microbatch: 2048" in str(advice)
    assert "the same command resumes" in str(advice)
    assert explain_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), args) is None


# --- the outside world


def test_a_tracker_that_is_down_is_one_warning(forks: Zygote, uninterrupted: Finished, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), trouble="tracker down") == 0, log.read_text()
    assert log.read_text().count("the tracker GoneCallback failed (ConnectionError: no route to the tracker)") == 1
    Finished(run).assert_equals(uninterrupted)


def test_an_error_of_the_users_own_callback_is_not_swallowed(forks: Zygote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forks.run("train", log, run_dir=str(tmp_path / "run"), trouble="own callback fails") == 1
    assert "of the user's own callback" in log.read_text()


def test_a_hub_that_is_down_is_one_warning(forks: Zygote, uninterrupted: Finished, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"push_to_hub": True, "hub_model_id": "me/model"}
    assert forks.run("train", log, run_dir=str(run), options=options) == 0, log.read_text()
    assert log.read_text().count("the hub failed") == 1
    Finished(run).assert_equals(uninterrupted)
    assert not list(run.glob(".upload-*"))


def test_only_weights_tokenizer_and_card_go_to_the_hub(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": "all_checkpoints", "max_steps": 3}
    assert forks.run("train", log, run_dir=str(run), trouble="recorded hub", options=options, push_at_end=True) == 0, log.read_text()
    sent = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("sent ")]
    weights = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert [set(names) for names in sent] == [weights, weights]
    assert not list(run.glob(".upload-*"))


# --- the folder


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"options": {"learning_rate": 1e-3}}, "learning_rate"),
        ({"options": {"per_device_train_batch_size": 4}}, "per_device_train_batch_size"),
        ({"num_rows": 23}, "data"),
        ({"options": {"orpo_alpha": 0.2}}, "orpo_alpha"),
    ],
)
def test_a_changed_run_is_refused_with_a_diff_and_touches_nothing(changes: dict[str, Any], key: str, forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    forks.run("train", log, run_dir=str(run), kill_after="checkpoint-6")
    before = {path.name for path in run.iterdir()}
    assert forks.run("train", log, run_dir=str(run), **changes) == 2
    assert f"{key}" in log.read_text().split("what changed")[1]
    assert {path.name for path in run.iterdir()} == before
    options = {**changes.get("options", {}), "allow_changed_resume": True}
    assert forks.run("train", log, run_dir=str(run), **{**changes, "options": options}) == 0, log.read_text()


def test_a_run_that_starts_anew_keeps_the_earlier_one_aside(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run)) == 0
    for number in (1, 2):
        assert forks.run("train", log, run_dir=str(run), anew=True, options={"max_steps": 4}) == 0, log.read_text()
        assert _step(run) == 4
        assert {line["step"] for line in jobs.metrics(run)} == {2, 4}
        assert verify(run / f"earlier-{number}" / ("checkpoint-14" if number == 1 else "checkpoint-4"))
        assert (run / f"earlier-{number}" / "metrics.jsonl").exists()


def test_the_best_and_the_last_stay_at_limit_1(forks: Zygote, tmp_path: Path) -> None:
    options = {
        "save_total_limit": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.05,
        "max_steps": 12,
    }
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), options=options) == 0, log.read_text()
    evaluations = {line["step"]: line["eval_loss"] for line in jobs.metrics(run) if "eval_loss" in line}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < 10, "the example should have its best early"
    names = sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert names == sorted({best, 10, 12})
    digests = json.loads((run / "final.json").read_text())
    assert digests == {**digests, **_weights(run / f"checkpoint-{best}")}, "the best model is the one at hand at the end"


def _weights(checkpoint: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {name: jobs._sha(tensor) for name, tensor in load_file(checkpoint / "model.safetensors").items()}


def test_nothing_in_a_checkpoint_is_a_pickle(forks: Zygote, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("train", log, run_dir=str(run), lora=True) == 0
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".jinja", ".md", ".txt"}
    assert len(files) > 10


@pytest.mark.parametrize("kind", disks.KINDS)
def test_full_disk_stops_the_run_and_keeps_the_earlier_checkpoint(
    kind: str, forks: Zygote, uninterrupted: Finished, tmp_path: Path
) -> None:
    with disks.small_disk(tmp_path / "disk", kind, 1500 * 1024) as disk:
        run, log = disk / "run", tmp_path / "log"
        filler = disk / "filler"
        filler.write_bytes(bytes(1_050_000))
        assert forks.run("train", log, run_dir=str(run)) == 2, log.read_text()
        assert "no room for the checkpoint" in log.read_text()
        assert _step(run) == 3
        assert not any(path.name.startswith(".staging-") for path in run.iterdir())
        filler.unlink()
        assert forks.run("train", log, run_dir=str(run)) == 0, log.read_text()
        Finished(run).assert_equals(uninterrupted)
