"""The rows of a run: streamed to ids, held out by prompt, some prompts kept; SFT-only rows mixed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo.data.stored.tokenise import KeptPrompts
from orpo.data.types import Dropped, Preference, TokenGroup, Where
from orpo.errors import DataError
from orpo.run.config import resolve
from orpo.run.data import NUM_PROMPTS, _shown_prompts, prepare_data
from tinymodels import build_tiny_model, build_tiny_tokenizer
from trainerruns import make_trainer, weights


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model("llama", vocab_size=384, num_layers=1).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def data_of(folder: Path, model_folder: Path, rows: list[Any], *more: list[Any], **keys: Any) -> Any:
    """(what is trained on, the lines told) of rows in one file or several."""
    paths = []
    for number, some in enumerate([rows, *more]):
        paths.append(folder / f"rows{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    source = str(paths[0]) if len(paths) == 1 else [{"path": str(path)} for path in paths]
    given = {"model_name_or_path": str(model_folder), "dataset_name": source, "output_dir": str(folder / "run"), "use_cpu": True, **keys}
    (folder / "run.yaml").write_text(json.dumps({"per_device_train_batch_size": 2, **given}), encoding="utf-8")
    config = resolve(str(folder / "run.yaml"), [])
    lines: list[str] = []
    return prepare_data(config, config.training_args(), lines.append), lines


PAIRS = [{"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
SINGLE = [{"prompt": f"Request {i}.", "completion": f"Answer number {i}."} for i in range(4)]


def test_rows_become_groups_in_order_and_prompts_are_kept(tmp_path: Path, model_folder: Path) -> None:
    data, lines = data_of(tmp_path, model_folder, [PAIRS[0], {**PAIRS[1], "chosen": " "}, *PAIRS[2:]], eval_fraction=0.4)
    assert sorted(group.where.row for group in [*data.train, *data.held_out]) == [0, *range(2, 12)]
    assert data.train_report.dropped == {"empty_answer": 1}
    assert len(data.prompts) == NUM_PROMPTS
    assert set(data.prompts) <= {PAIRS[group.where.row]["prompt"] for group in data.held_out}
    assert any("dropped 1: empty_answer" in line and "rows0.jsonl:2" in line for line in lines)


def test_what_the_policies_touched_is_told_before_training(tmp_path: Path, model_folder: Path) -> None:
    long = [{**PAIRS[0], "prompt": "word " * 200}, {**PAIRS[1], "chosen": "word " * 200}]
    data, lines = data_of(tmp_path, model_folder, [*PAIRS, *long], max_length=80, truncation="keep_end")
    told = "\n".join(lines)
    assert len(data.train) == 14
    assert "altered 1: prompt_trimmed" in told
    assert "altered 1: answer_cut" in told
    assert "rows0.jsonl:13" in told
    _, lines = data_of(tmp_path, model_folder, [*PAIRS, *long], max_length=80)
    assert "dropped 1: prompt_too_long" in "\n".join(lines)
    assert "dropped 1: too_long" in "\n".join(lines)


def test_nothing_left_stops_with_the_histogram(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no row of train rows can be trained on: 0 of 3.*dropped 3: empty_answer.*rows0\.jsonl:1"):
        data_of(tmp_path, model_folder, [{**row, "chosen": ""} for row in PAIRS[:3]])


def test_a_wrong_source_stops_before_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column for the rejected answer"):
        data_of(tmp_path, tmp_path / "no model here", [{"prompt": "Q?", "chosen": "good"}])


def test_prompts_are_thinned_out_where_there_are_many() -> None:
    rows: list[Preference | Dropped] = [Preference(f"Q{i}?", ("a", "b"), ((0, 1),), Where("f", i)) for i in range(1000)]
    rows[5] = Dropped("empty_answer", Where("f", 5))
    prompts = KeptPrompts(most=16)
    assert list(prompts.watch(rows)) == rows
    assert len(prompts.kept) <= 16
    groups = [TokenGroup(None, (), (), (), row.where) for row in rows]  # type: ignore[arg-type]
    found = [int(str(prompt)[1:-1]) for prompt in _shown_prompts(prompts.kept, groups)]
    assert len(found) == NUM_PROMPTS
    assert found == sorted(found)
    assert found[0] < 400 < found[-1]  # spread over the rows
    assert _shown_prompts(prompts.kept, []) == ()


def test_sft_only_rows_train_without_an_odds_ratio_term(tmp_path: Path, model_folder: Path) -> None:
    """The same step to the bit whatever the odds ratio weighs, where all rows of the step are SFT-only; not so beside a pair."""
    data, lines = data_of(tmp_path, model_folder, PAIRS[:4], SINGLE, sft_rows=True)
    assert [bool(group.pairs) for group in data.train] == [True] * 4 + [False] * 4
    assert "4 SFT-only rows" in lines[0]

    def after_a_step(groups: list[TokenGroup], alpha: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_tiny_model("llama", vocab_size=384, num_layers=1)
        trainer = make_trainer(
            tmp_path / "run", groups, model=model, max_steps=1, orpo_alpha=alpha, gradient_accumulation_steps=4, dataloader_drop_last=False
        )
        trainer.train()
        return weights(trainer.model)

    alone, weighed = (after_a_step(data.train[4:], alpha) for alpha in (0.0, 5.0))
    assert all(torch.equal(alone[name], weighed[name]) for name in alone)
    mixed, weighed = (after_a_step(data.train, alpha) for alpha in (0.0, 5.0))
    assert any(not torch.equal(mixed[name], weighed[name]) for name in mixed)
    assert any(not torch.equal(alone[name], mixed[name]) for name in alone)
