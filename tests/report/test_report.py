"""The report's page: what it shows of whole, half-written and damaged folders, and that nothing in them runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from htmlpages import parse
from orpo.cli import main
from orpo.errors import UserError
from orpo.objective import KINDS, SimPO
from orpo.report import write_report
from orpo.report.comparison import comparison_page
from orpo.report.curves import running_mean, thinned
from orpo.report.evaluations import verdict
from orpo.report.facts import ComparisonFacts, Logs, RunFacts, read_logs
from orpo.report.runpage import run_page
from orpo.report.sections import bars, estimate, excludes_zero, human_bytes, human_count, human_seconds, show, text
from orpo.report.tokens import token_section
from reportfolders import TASKS, comparison_facts, logs, make_comparison, make_run, results, run_facts, show_of, shown_pair, write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report") / "first")
    write_report(folder)
    return folder


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(parse(page).scripts[0])
    return found


def text_of(page: str) -> str:
    """What is to be read on the page, without the styles."""
    main = page[page.index("<main>") : page.index("</main>")]
    return re.sub(r"\s+", " ", parse(main.replace("<", " <")).text)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["report", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# ---- numbers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "style", "expected"),
    [
        (0.917, ".1%", "91.7 %"),
        (-0.5, "+.1%p", "−50.0 points"),
        (1.5, "+.2f", "+1.50"),
        (-1.5, ".2f", "−1.50"),
        (None, ".2f", "–"),
        (float("nan"), ".2f", "–"),
        ("3", ".2f", "–"),
        (True, ".2f", "–"),
    ],
)
def test_numbers_are_shown_or_a_dash(value: object, style: str, expected: str) -> None:
    assert show(value, style) == expected


def test_estimates() -> None:
    cell = estimate({"value": 0.5, "low": 0.4, "high": 0.6}, "+.1%p")
    assert (cell.text, cell.detail) == ("+50.0 points", "+40.0 to +60.0")
    assert estimate({"value": 0.5, "low": None, "high": None}, ".2f").detail == ""
    assert estimate(None).text == estimate([1, 2]).text == estimate({"value": "1"}).text == "–"
    signs = [
        excludes_zero(value)
        for value in ({"low": 0.1, "high": 1}, {"low": -1, "high": -0.1}, {"low": -1, "high": 1}, {"low": None, "high": 1}, 3)
    ]
    assert signs == [1, -1, 0, 0, 0]


def test_bars_share_one_scale() -> None:
    one, other, none = bars([{"value": 1, "low": 0.5, "high": 1.5}, {"value": -1, "low": -1, "high": -1}, None])
    assert one.bar is not None
    assert other.bar is not None
    assert none.bar is None
    assert other.bar.low == other.bar.value == other.bar.high == 4 < one.bar.zero == other.bar.zero < one.bar.low < one.bar.high == 96
    middle = 4 + 92 * (0 - -1) / 2.5
    assert one.bar.zero == pytest.approx(middle, abs=0.01)


def test_quantities() -> None:
    assert [human_count(n) for n in (0, 1234, 134_515_008, 2.1e13, None)] == ["0", "1,234", "134.5 M", "21.0 T", "–"]
    assert [human_seconds(s) for s in (0.44, 45, 59.7, 200, 7500, None)] == ["0.4 s", "45 s", "1 min 00 s", "3 min 20 s", "2 h 05 min", "–"]
    assert [human_bytes(n) for n in (10, 1536, 2**31, "x")] == ["10 B", "1.5 KiB", "2.0 GiB", "–"]


def test_messages_are_shown_by_their_contents() -> None:
    assert text([{"role": "user", "content": "Hi"}]) == "Hi"
    assert text([{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}, 7]) == "system: Be kind\nuser: Hi"
    assert text(None, "none") == text({"a": 1}, "none") == text(True, "none") == "none"


def test_running_means_and_thinning() -> None:
    assert running_mean([1, 2, 3, 4, 5], 3) == [1.5, 2, 3, 4, 4.5]
    assert running_mean([7], 5) == [7]
    steps, values = thinned(range(5000), [float(n % 2) for n in range(5000)])
    assert len(steps) == len(values) <= 1200
    assert steps[-1] == 4999
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


# ---- a run -----------------------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_has_every_part(whole: Path) -> None:
    shown = text_of(page_of(whole))
    for words in (
        "smollm2-135m-instruct, tuned with ORPO on 300 preference pairs of pairs.jsonl, 80 steps",
        "next-token loss (prompt and chosen answer) + 1 × odds-ratio term",
        "41.7 → 91.7 %",
        "The margin rose, clear of zero: rejected answers became less likely.",
        "+50.0 points",
        "empty_answer an answer is empty or blank",
        "Where is my parcel?",
        "Red and blue.",
        "perplexity",
        "prompt, strict",
        "humanities",
        "Win rate over gpt4_turbo",
        "The judge took the answer shown first in 55% of its decisions.",
        "training time, evaluations inside 6 min 52 s",
        "orpo train recipe.yaml --learning_rate 5e-5",
        "torch 2.13.0",
        "2c6b9cdac7be3e9088e9613254494ae5567c26cb4d4dc468e1e545fdd5fb6f9b",
    ):
        assert words in shown, words
    drawn = {"loss", "logps", "odds", "accuracy", "share", "speed", "norm", "rate", "parting"}
    drawn |= {f"{task}-1" for task in ("ifeval", "mtbench", "alpacaeval", "custom")}
    assert set(figures_of(page_of(whole))) == drawn


def test_curves_are_those_of_the_log(tmp_path: Path) -> None:
    """As logged where there are few points; the odds-ratio part is what the weight makes of it, so that the parts add up to the loss."""
    facts = run_facts()
    facts["configuration"]["orpo_alpha"]["value"] = 0.25
    write_json(tmp_path / "run.json", facts)
    records = [{"step": n, "loss": 2.0 + n, "nll_loss": 1.5 + n, "log_odds_ratio": -2.0, "grad_share/odds_ratio": 0.25} for n in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report(tmp_path)
    figures = figures_of(page_of(tmp_path))
    loss = {trace["name"]: trace["y"] for trace in figures["loss"]["traces"]}
    assert loss == {"loss": [2.0, 3.0, 4.0], "next-token loss": [1.5, 2.5, 3.5], "odds-ratio term, weighed": [0.5, 0.5, 0.5]}
    shares = {trace["name"]: trace["y"] for trace in figures["share"]["traces"]}
    assert shares == {"odds-ratio term": [0.25] * 3, "next-token loss": [0.75] * 3}


def test_a_stage_of_a_comparison_is_not_called_orpo(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "stage", tasks=())
    write_json(folder / "run.json", run_facts() | {"objective": KINDS["simpo"].facts(SimPO()), "command": "compare"})
    report = write_report(folder)
    shown, figures = text_of(page_of(folder)), figures_of(page_of(folder))
    assert "tuned with SimPO on 300" in shown
    assert "odds-ratio term" not in shown + str(figures["loss"])
    assert "share" not in figures
    assert report.card is not None
    assert "Trained with ORPO" not in report.card.read_text(encoding="utf-8")


def test_the_card_of_a_plain_run_has_what_the_run_measured_itself(tmp_path: Path) -> None:
    """Nobody has run `orpo eval`: the last evaluation of training is what there is, and no word of results where there is none either."""
    folder = make_run(tmp_path / "run", tasks=())
    text = (write_report(folder).card or folder).read_text(encoding="utf-8")
    last = json.loads([line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line][-1])
    assert f"| chosen answer preferred | {last['eval_rewards/accuracies']:.1%} |" in text
    assert f"at step {last['step']}, on rows of" in text
    assert "The results above" in text
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval_" not in line]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    text = (write_report(folder).card or folder).read_text(encoding="utf-8")
    assert "results above" not in text
    assert "Nothing was measured on rows that were held out" in text


def test_the_card_says_which_tokens_are_new(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    assert "New tokens" not in (write_report(folder).card or folder).read_text(encoding="utf-8")
    for adapter, kept in ((True, "the adapter holds their rows"), (False, "the embeddings have rows for them")):
        facts = run_facts()
        facts["data"]["template"]["new_tokens"] = ["<|im_start|>", "<|im_end|>", "<script>*x*"]
        facts["configuration"]["use_peft"] = {"value": adapter, "origin": "orpo.yaml:3"}
        write_json(folder / "run.json", facts)
        text = (write_report(folder).card or folder).read_text(encoding="utf-8")
        assert "## New tokens" in text
        assert "embeddings were resized" in text
        assert kept in text
        assert "&lt;\\|im\\_end\\|&gt;" in text
        assert "<script>" not in text


def test_the_card_names_the_base_and_its_licence_as_the_base_s_own_card_does(tmp_path: Path) -> None:
    """A local base has no hub id of its own; its card may say where it is from."""
    base, folder = tmp_path / "base", make_run(tmp_path / "run", tasks=())
    for kind, card, expected in (
        ("folder", "---\nbase_model: someone/model\nlicense: mit\n---\n# A model\n", {"base_model": "someone/model", "license": "mit"}),
        ("folder", "---\nbase_model: [several, things]\nlicense: '<b>'\n---\n", {}),
        ("folder", "---\n: broken: [\n---\n", {}),
        ("folder", None, {}),
        ("alias", None, {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}),
    ):
        base.mkdir(exist_ok=True)
        (base / "README.md").unlink(missing_ok=True)
        if card is not None:
            (base / "README.md").write_text(card, encoding="utf-8")
        facts = run_facts()
        facts["model"] |= {"kind": kind, "location": str(base)}
        write_json(folder / "run.json", facts)
        text = (write_report(folder).card or folder).read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert {key: metadata[key] for key in ("base_model", "license") if key in metadata} == expected
        assert str(tmp_path) not in text


def test_evaluations_of_several_sets_have_a_line_each() -> None:
    logs_ = Logs(evaluation=[{"step": 1, "eval_kind_nll_loss": 2.0, "eval_other_nll_loss": 3.0}])
    assert logs_.evaluation_prefixes == ["eval_kind_", "eval_other_"]
    assert logs_.series("eval_other_nll_loss") == ([1.0], [3.0])


def test_a_long_run_makes_no_heavy_page(tmp_path: Path) -> None:
    make_run(tmp_path / "long", num_steps=6000, tasks=())
    make_run(tmp_path / "short", num_steps=80, tasks=())
    sizes = [write_report(tmp_path / name).page.stat().st_size for name in ("short", "long")]
    assert sizes[1] - sizes[0] < 600_000


def test_radar_and_win_rates_stand_beside_others(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    write_report(one, beside=[two])
    figures = figures_of(page_of(one))
    assert [trace["name"] for trace in figures["mtbench-1"]["traces"]] == ["this-run", "two"]
    assert [trace["name"] for trace in figures["alpacaeval-1"]["traces"]] == ["this-run", "two"]
    assert figures["alpacaeval-1"]["traces"][0]["y"] == ["win rate", "length-controlled"]
    expected = [part["value"] for part in results()["mtbench"]["by_category"].values()]
    assert figures["mtbench-1"]["traces"][0]["r"] == [*expected, expected[0]]  # closed


def test_results_alone_are_a_report_too(tmp_path: Path) -> None:
    """`orpo eval MODEL` leaves a folder without a run."""
    make_run(tmp_path / "model")
    folder = tmp_path / "model" / "eval"
    report = write_report(folder)
    assert report.page == folder / "report.html"
    assert report.card is None
    assert "MT-Bench" in text_of(page_of(folder))
    assert any("no run.json" in note for note in report.notes)


@pytest.mark.parametrize("inside", ["model", "adapter"])
def test_a_folder_inside_a_run_means_the_run(tmp_path: Path, inside: str) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    (folder / inside).mkdir()
    assert write_report(folder / inside).page == folder / "report.html"


def test_a_collapse_is_read_before_any_praise(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    found = results()["retention"]
    found["model"]["answers"]["loops"] = {"value": 0.96, "low": 0.8, "high": 0.99}
    found["change"]["loops"] = {"value": 0.91, "low": 0.7, "high": 0.99}
    found["change"]["nll"] = {"value": -0.1, "low": -0.2, "high": -0.05}
    write_json(folder / "eval" / "retention.json", {"task": "retention", "result": found, "show": show_of("retention", found)})
    write_report(folder)
    page = page_of(folder)
    warned, praised = page.index("The answers have collapsed"), page.index("The margin rose, clear of zero")
    assert warned < praised
    assert '<div class="statement warn"><span class="mark">!</span>The answers have collapsed' in page
    better = page.index("The model predicts neutral text better than before")
    assert "✓" not in page[better - 60 : better]


def test_a_margin_that_rose_by_pushing_both_answers_away_is_no_praise() -> None:
    change = {"margin": {"value": 1, "low": 0.5, "high": 1.5}, "chosen_logp": {"value": -1, "low": -1.5, "high": -0.5}}
    assert verdict({**change, "rejected_logp": {"value": -2, "low": -3, "high": -1}}).tone == "warn"


@pytest.mark.parametrize(
    ("first", "second", "value", "tone"),
    [("orpo", "sft", 0.3, "good"), ("orpo", "sft+dpo", -0.3, "bad"), ("sft", "orpo", 0.3, "bad"), ("sft", "simpo", 0.3, "")],
)
def test_no_tick_stands_beside_a_loss(tmp_path: Path, first: str, second: str, value: float, tone: str) -> None:
    facts = comparison_facts()
    difference = {"value": value, "low": value - 0.1, "high": value + 0.1}
    facts["verdicts"] = [
        {"metric": "margin", "first": first, "second": second, "difference": difference, "is_clear": True, "text": "Said so"}
    ]
    page = comparison_page(ComparisonFacts(tmp_path, facts, []))
    (said,) = (one for section in page.sections for one in section.statements if one.text == "Said so")
    assert said.tone == tone


def test_a_collapse_of_a_method_is_told_before_who_won(tmp_path: Path) -> None:
    facts = comparison_facts()
    found = results()["retention"]
    del found["against"], found["change"]
    found["model"]["answers"]["loops"] = {"value": 0.96, "low": 0.8, "high": 0.99}
    facts["methods"]["orpo"]["runs"][0]["evaluations"]["retention"] = {"result": found, "show": show_of("retention", found)}
    page = comparison_page(ComparisonFacts(tmp_path, facts, []))
    assert page.sections[0].statements[0].text.startswith("ORPO: The answers have collapsed: 96% of the answers go round in circles")
    assert page.sections[0].statements[0].tone == "warn"


def test_wide_tables_name_their_cells_for_a_phone(whole: Path) -> None:
    """Where a row is read cell by cell, each one says what it is."""
    page = page_of(whole)
    assert page.count('<table class="stack">') + page.count('<table class="tight stack">') >= 4
    result = page[page.index('id="result"') : page.index('id="curves"')]
    for name in ("before", "after", "change"):
        assert f'data-label="{name}"' in result
    assert "60 prompts would have shown a change of accuracy of" in result


# ---- what may be missing or damaged ------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_the_rest_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    lines[3:3] = [b"\xff\xfe", b'{"step": 2, "loss"', b"[1, 2]", b'{"loss": 1}', b'{"step": "x", "loss": 1}']
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'{"step": 81, "lo')
    notes: list[str] = []
    found = read_logs(folder / "metrics.jsonl", notes)
    assert len(found.training) == 80
    assert notes == ["metrics.jsonl: 5 lines are damaged and left out (4, 5, 6, 7, 8)."]
    report = write_report(folder)
    assert notes[0] in report.notes
    assert notes[0] in text_of(page_of(folder))


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "loss": "nan", "grad_norm": "inf", "nll_loss": 2.5}\n')
    report = write_report(folder)
    assert "2 logged values are not finite numbers; they leave gaps in the curves." in report.notes
    assert max(figures_of(page_of(folder))["loss"]["traces"][0]["x"]) == 80


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"status": "running", "last_step": None, "ended_unix_s": None}, "The run has not ended: the last log is of step 80 of 80."),
        (
            {"status": "stopped", "last_step": 30, "ended_by": "SignalStop: SIGTERM"},
            "The run stopped at step 30 of 80: SignalStop: SIGTERM.",
        ),
        ({"status": "failed", "last_step": 30, "ended_by": None}, "The run failed at step 30 of 80."),
    ],
)
def test_a_run_that_has_not_come_to_its_end_says_so(tmp_path: Path, status: dict[str, Any], said: str) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    write_json(folder / "run.json", run_facts() | status)
    report = write_report(folder)
    assert any(note.startswith(said) for note in report.notes)
    page = page_of(folder)
    assert said in text_of(page)
    assert f">{status['status']}</span>" in page
    assert "loss" in figures_of(page)


def test_every_file_may_be_missing_by_itself(tmp_path: Path) -> None:
    for task in TASKS:
        write_report(make_run(tmp_path / task, tasks=(task,)))
    bare = make_run(tmp_path / "bare", tasks=())
    (bare / "metrics.jsonl").unlink()
    report = write_report(bare)
    assert "There is no metrics.jsonl: no curves." in report.notes
    assert any(note.startswith("Nothing was compared with the model before the training yet: orpo eval") for note in report.notes)
    lost = make_run(tmp_path / "lost", tasks=("pairs",))
    (lost / "run.json").unlink()
    assert any("no run.json" in note for note in write_report(lost).notes)
    assert "The margin rose" in text_of(page_of(lost))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"result": 3}', "\udcff", '{"result": {}}', "[" * 100_000])
@pytest.mark.parametrize("name", ["run.json", "eval/pairs.json", "eval/mtbench.json", "eval/demo.json"])
def test_damaged_files_are_left_out(tmp_path: Path, name: str, content: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    report = write_report(folder)
    assert "AlpacaEval" in text_of(page_of(folder))
    is_whole_object = name == "eval/demo.json" and content.startswith("{") and len(content) > 1
    if not is_whole_object and content != '{"result": {}}':
        assert report.notes


WRONG_KINDS = (None, "text", [3], {})


def test_no_value_of_a_wrong_kind_breaks_the_page(tmp_path: Path) -> None:
    """Every value in turn is replaced by one of another kind; the page is made all the same."""
    found = results()
    found["pairs"]["shown"] = found["pairs"]["shown"][:1]
    for other in WRONG_KINDS:
        for damaged in _each_replaced(run_facts(), other):
            run_page(RunFacts(tmp_path, damaged, Logs(), {}, {}, []))
        for task, result in found.items():
            for damaged in _each_replaced({"task": task, "judge": {"model": "j"}, "result": result, "show": show_of(task, result)}, other):
                if isinstance(damaged["result"], dict):
                    page = run_page(RunFacts(tmp_path, {}, Logs(), {task: damaged}, {}, []))
    assert page.sections


def test_no_value_of_a_wrong_kind_breaks_a_comparison(tmp_path: Path) -> None:
    whole = comparison_facts(num_seeds=1)
    for name in ("sft", "simpo"):
        del whole["methods"][name]
    for other in ("text", [None]):
        for damaged in _each_replaced(whole, other):
            if isinstance(damaged["methods"], dict):
                page = comparison_page(ComparisonFacts(tmp_path, damaged, []))
    assert page.sections


def _each_replaced(whole: Any, other: Any, depth: int = 0) -> Any:
    """Copies of a structure in which one part is another value: every part to a depth of four, lists by their first."""
    if depth > 4:
        return
    keys = list(whole) if isinstance(whole, dict) else range(min(len(whole), 1)) if isinstance(whole, list) else ()
    for key in keys:
        copy = whole.copy()
        copy[key] = other
        yield copy
        for inner in _each_replaced(whole[key], other, depth + 1):
            copy = whole.copy()
            copy[key] = inner
            yield copy


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def test_the_command_says_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", tasks=())
    code, out, err = run(capsys, folder)
    assert code == 0
    assert f"page         {folder / 'report.html'}" in out
    assert f"model card   {folder / 'README.md'}" in out
    assert "note         Nothing was compared with the model before" in err
    code, out, _ = run(capsys, folder, "--output", tmp_path / "other.html", "--no_card")
    assert (code, out) == (0, f"page         {tmp_path / 'other.html'}\n")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    folder = make_run(tmp_path / "run", tasks=())
    for words, said in (
        (["missing"], "does not exist"),
        (["empty"], "is neither a run nor a comparison"),
        (["file"], "is a file"),
        ([folder, "--output", tmp_path / "no" / "page.html"], "cannot be written"),
        ([folder, "--output", tmp_path / "empty"], "is a folder"),
        ([folder, "--beside", tmp_path / "empty"], "is neither a run nor a comparison"),
    ):
        code, out, err = run(capsys, *(tmp_path / word if isinstance(word, str) and not word.startswith("-") else word for word in words))
        assert code == 2
        assert said in err
        assert "Traceback" not in out + err


def test_without_plotly_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("orpo.webpage.importlib.util.find_spec", lambda name, *rest: None if name == "plotly" else real(name, *rest))
    folder = make_run(tmp_path / "run", tasks=())
    code, _, err = run(capsys, folder)
    assert code == 2
    assert 'pip install "plotly>=6.0"' in err
    assert not (folder / "report.html").exists()


def test_a_report_loads_no_model_library(tmp_path: Path) -> None:
    """Reading a run must not take the seconds and gigabytes of torch."""
    folder = make_run(tmp_path / "run")
    code = f"import sys; from orpo.report import write_report; write_report({str(folder)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.split())


# ---- token by token --------------------------------------------------------------------------------------------------------------------


def test_tokens_are_coloured_by_their_numbers() -> None:
    shown = {
        "where": "/data/test.jsonl:3",
        "model": {side: {"tokens": ["A", "\n", ""], "logps": [-0.05, -2.0, -7.0]} for side in ("chosen", "rejected")} | {"prompt": "Q"},
        "against": {side: {"tokens": ["A", "\n", ""], "logps": [-4.0, -2.05, -3.0]} for side in ("chosen", "rejected")},
    }
    (pair,) = token_section({"result": {"shown": [shown]}}).pairs
    assert pair.where == "test.jsonl:3"
    first, line_end, empty = pair.answers[0].tokens
    assert first.classes.split() == ["a0", "b5", "u5"]
    assert first.title == "before −4.00 (1.8 %), after −0.05 (95 %), change +3.95"
    assert line_end.classes.split() == ["a3", "b3", "u0"]
    assert (line_end.text, empty.text) == ("↵\n", "·")
    assert empty.classes.split()[2] == "d5"
    assert pair.answers[0].summary == "mean −3.02 → −3.02 (+0.00)"


def test_pairs_without_numbers_for_each_token_are_left_out() -> None:
    good, bad = shown_pair("", 1), shown_pair("", 2)
    bad["model"]["chosen"]["logps"][0] = None
    alone = {key: value for key, value in shown_pair("", 3).items() if key != "against"}
    pairs = token_section({"result": {"shown": [good, bad, None, alone]}}).pairs
    assert len(pairs) == 2
    assert "→" in pairs[0].summary
    assert "→" not in pairs[1].summary


@pytest.mark.parametrize(
    ("margin", "rejected", "tone", "said"),
    [
        ((0.1, 1.0), (-0.5, -0.1), "good", "rejected answers became less likely"),
        ((0.1, 1.0), (0.1, 0.5), "good", "both kinds of answers became likelier"),
        ((0.1, 1.0), (-0.1, 0.5), "good", "The margin rose, clear of zero."),
        ((-0.1, 1.0), (-0.5, -0.1), "open", "cannot be told from chance"),
        ((-1.0, -0.1), (-0.5, -0.1), "bad", "fell"),
        ((None, None), (None, None), "open", "too few"),
    ],
)
def test_the_verdict_says_what_the_intervals_allow(margin: Any, rejected: Any, tone: str, said: str) -> None:
    found = verdict(
        {"margin": dict(zip(("low", "high"), margin, strict=True)), "rejected_logp": dict(zip(("low", "high"), rejected, strict=True))}
    )
    assert found.tone == tone
    assert said in found.text


# ---- comparisons -----------------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_comparison_has_every_part(tmp_path: Path) -> None:
    report = write_report(make_comparison(tmp_path / "cmp"))
    assert report.card is None
    assert report.notes == []
    page = page_of(tmp_path / "cmp")
    shown = text_of(page)
    for words in (
        "SFT, SFT + DPO, SimPO and ORPO, each from the same start (smollm2-135m-instruct)",
        "margin: ORPO is 1.050 higher than SFT",
        "✗ ORPO needs less memory than SFT + DPO 1.00 times its peak",
        "? ORPO prefers the chosen answer more often not measured",
        "floating-point operations 65.0 T 1.00 × 130.0 T 2.00 ×",
        "learning_rate 5e-05, orpo_alpha 1 (chosen)",
    ):
        assert words in shown, words
    figures = figures_of(page)
    assert set(figures) >= {"accuracy", "margin", "parting0", "parting3", "margins", "flops", "train_s", "sweep0", "sweep1", "ifeval-1"}
    ranges = {tuple(figures[f"parting{place}"]["layout"]["yaxis"]["range"]) for place in range(4)}
    assert len(ranges) == 1  # one scale, or the panels could not be compared
    assert len(figures["parting1"]["layout"]["shapes"]) == 1  # where DPO begins
    heat = figures["sweep0"]["traces"][0]
    assert heat["z"][1][1] == 1.3
    assert heat["zmax"] == figures["sweep1"]["traces"][0]["zmax"]


def test_a_comparison_under_way_shows_what_there_is(tmp_path: Path) -> None:
    facts = comparison_facts()
    for name in ("simpo", "orpo"):
        facts["methods"][name] = {
            "label": facts["methods"][name]["label"],
            "strength_name": None,
            "options": None,
            "trials": [],
            "runs": [],
        }
    facts |= {"status": "running", "verdicts": [], "claims": [], "sweep": {}}
    write_json(tmp_path / "comparison.json", facts)
    report = write_report(tmp_path)
    assert "done: SFT, SFT + DPO; missing: SimPO, ORPO" in report.notes[0]
    assert "What is claimed" not in text_of(page_of(tmp_path))
    assert "parting1" in figures_of(page_of(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "comparison"}'])
def test_a_damaged_comparison_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(UserError, match=r"comparison\.json"):
        write_report(tmp_path)


def test_logs_of_a_real_length_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logs(40)))
    found = read_logs(tmp_path / "metrics.jsonl", [])
    assert (len(found.training), len(found.evaluation), found.end["train_runtime"]) == (40, 4, 412.5)
