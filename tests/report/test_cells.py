"""What a notebook shows: runs, reports, comparisons, audits, without a script and whatever the data says."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from htmlpages import HOSTILE, parse
from orpo import ORPOConfig, ORPOTrainer, audit
from orpo.audit.result import Audit
from orpo.report import Report, write_report
from orpo.report.facts import ComparisonFacts, Logs
from orpo.report.inline_run import comparison_cell, run_cell
from orpo.training.notebook import LiveTable
from orpo.webpage.inline import Curve, chart


def pictures(cell: str) -> list[str]:
    """The charts of a cell, each checked to be an image that loads nothing."""
    found = [base64.b64decode(data).decode() for data in re.findall(r"src='data:image/svg\+xml;base64,([^']+)'", cell)]
    for picture in found:
        assert xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")  # noqa: S314  (our own)
        assert "href" not in picture
        assert "<script" not in picture
    return found


def tags(cell: str) -> set[str]:
    return {tag for tag, _ in parse(cell).tags}


HARMLESS = {"p", "b", "div", "table", "thead", "tbody", "tr", "th", "td", "img", "ul", "li", "a"}


def logs(*records: dict[str, Any]) -> Logs:
    made = Logs()
    for record in records:
        made.add(record)
    return made


def step(number: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 3.0 / number, "nll_loss": 2.0 / number, "rewards/accuracies": 0.5, "logps/chosen": -1.0, "logps/rejected": -1.5}
    return {"step": number, **values, **more}


def test_a_run_shows_its_curves_and_its_newest_values() -> None:
    cell = run_cell(logs(*(step(number) for number in range(1, 31)), {**step(30), "train_runtime": 1.0}), "step 30 of 30")
    assert len(pictures(cell)) == 3
    text = parse(cell).text
    assert "+0.500" in text
    assert "50%" in text
    assert cell.count("<tr>") == 13, "the newest twelve, and the head"


def test_what_is_no_number_is_shown_and_drawn_around() -> None:
    cell = run_cell(logs(step(1), step(2, loss="nan"), step(3)), "")
    assert "nan" in parse(cell).text
    assert len(pictures(cell)) == 3


def test_a_run_without_a_log_has_only_its_head() -> None:
    assert parse(run_cell(Logs(), "step 0 of 9")).text == "step 0 of 9"


def test_evaluations_have_a_table_of_their_own() -> None:
    held_out = {f"eval_{name}": value for name, value in step(2).items() if name != "step"}
    assert "Held out" in parse(run_cell(logs(step(1), step(2), {"step": 2, **held_out}), "")).text


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-30, 2e-30], [-1e30, 1e30], [5.0, 5.0, 5.0]])
def test_any_finite_curve_is_drawn(values: list[float]) -> None:
    (picture,) = pictures(chart("values", [Curve("one", "#000", list(range(len(values))), values)]))
    (points,) = re.findall(r"points='([^']+)'", picture)
    assert all(0 <= float(number) <= 320 for number in re.split("[ ,]", points))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    head = run_cell(logs(step(1), step(2), step(3)), HOSTILE)
    found = ComparisonFacts(tmp_path, {"methods": {HOSTILE: {"label": HOSTILE, "summary": {}}}}, [])
    methods = comparison_cell(found, HOSTILE)
    report = Report(tmp_path / HOSTILE.replace("/", ""), None, [HOSTILE], head)._repr_html_()
    rows = [{"prompt": f"{HOSTILE} {n}", "chosen": f"{HOSTILE} yes {n}", "rejected": HOSTILE, "scenario": HOSTILE} for n in range(30)]
    judged = audit([*rows, *rows[:3], {"prompt": HOSTILE, "chosen": "", "rejected": HOSTILE}])
    judged.source = HOSTILE
    drawn = chart(HOSTILE, [Curve(HOSTILE, "#000", [0, 1], [0, 1])])
    for cell in (head, methods, report, judged._repr_html_(), drawn):
        assert tags(cell) <= HARMLESS
        pictures(cell)


def test_an_audit_has_a_row_for_each_finding() -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": f"No {n}."} for n in range(8)]
    found = audit([*rows, *rows[:2]])
    assert isinstance(found, Audit)
    text = parse(found._repr_html_()).text
    assert all(finding.code in text and finding.kind.mend in text for finding in found.findings)


def test_a_trainer_and_its_report_show_the_run(tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> None:
    """And the table that grows in a cell, as a notebook would have put it in."""
    tokenizer = tiny_tokenizer_factory()
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(8)]
    options = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    config = ORPOConfig(output_dir=str(tmp_path / "run"), **options)
    model = tiny_model_factory("llama", vocab_size=len(tokenizer))
    trainer = ORPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    pytest.importorskip("IPython", reason="the extra `notebook` is not installed")
    live = LiveTable()
    trainer.add_callback(live)
    trainer.train()
    cell = trainer._repr_html_()
    assert "LlamaForCausalLM on 8 rows, step 3 of 3" in parse(cell).text
    assert len(pictures(cell)) == 3
    assert len(pictures(live.html(trainer.state))) == 3
    pytest.importorskip("plotly", reason="the extra `report` is not installed")
    shown = write_report(tmp_path / "run", with_card=False)._repr_html_()
    assert len(pictures(shown)) == 3
    assert "report.html" in shown
    assert json.dumps(rows[0]["prompt"])[1:-1] not in shown
