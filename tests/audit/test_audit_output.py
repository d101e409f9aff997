"""What an audit writes: the cleaned set, the page, and what the command line prints and exits with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from htmlpages import HOSTILE, Page, parse
from orpo.audit import AuditOptions, run_audit, write_clean
from orpo.audit.page import render_page
from orpo.cli import main
from orpo.errors import EXIT_USER, DataError, UserError

from .test_audit_findings import plain_rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def dirty_rows() -> list[dict[str, Any]]:
    rows = plain_rows(60)
    rows[10]["chosen"] = ""
    rows[20] = dict(rows[19])
    rows[30]["rejected"] += " \ufffd"
    rows[40]["prompt"] += " \u2028 </s>"
    return rows


def test_the_cleaned_set_holds_the_rows_as_they_were(tmp_path: Path) -> None:
    rows = dirty_rows()
    path = write(tmp_path / "rows.jsonl", rows)
    cleaned = write_clean(run_audit(path), path, AuditOptions(), tmp_path / "clean.jsonl")
    assert cleaned.left == {"empty_answer": 1, "duplicates": 1, "replacement_character": 1}
    raw = (tmp_path / "clean.jsonl").read_text(encoding="utf-8")
    assert len(raw.splitlines()) == raw.count("\n") == 57  # no reader takes U+2028 for a line end
    assert [json.loads(line) for line in raw.splitlines()] == [row for i, row in enumerate(rows) if i not in (10, 20, 30)]
    log = [json.loads(line) for line in (tmp_path / "clean.jsonl.log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(item["line"], item["codes"]) for item in log] == [
        (11, ["empty_answer"]),
        (21, ["duplicates"]),
        (31, ["replacement_character"]),
    ]
    assert not list(tmp_path.glob(".*"))


def test_rows_stay_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", dirty_rows())
    cleaned = write_clean(run_audit(path), path, AuditOptions(), tmp_path / "clean.jsonl", keep=["duplicates"])
    assert cleaned.left == {"empty_answer": 1, "replacement_character": 1}


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", dirty_rows())
    audit = run_audit(path)
    with pytest.raises(UserError, match="the file exists"):
        write_clean(audit, path, AuditOptions(), path)
    with pytest.raises(UserError, match="JSON lines"):
        write_clean(audit, path, AuditOptions(), tmp_path / "clean.csv")
    with pytest.raises(UserError, match="no finding 'shortcut' makes rows leave"):
        write_clean(audit, path, AuditOptions(), tmp_path / "clean.jsonl", keep=["shortcut"])
    write(path, [{}, *dirty_rows()])
    path.write_text("\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match="changed since the audit"):
        write_clean(audit, path, AuditOptions(), tmp_path / "clean.jsonl")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["rows.jsonl"]


def test_rated_rows_are_written_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i // 2}", "response": f"answer {i} words", "score": i % 2 if i != 7 else 0} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    cleaned = write_clean(run_audit(path), path, AuditOptions(), tmp_path / "clean.jsonl")
    assert cleaned.left == {"no_preference": 1}
    written = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [row for i, row in enumerate(rows) if i not in (6, 7)]


def hostile_page(tmp_path: Path) -> str:
    rows = plain_rows(120)
    for i, row in enumerate(rows):
        row["scenario"] = HOSTILE if i % 2 else "plain"
        row["chosen"] = f"{HOSTILE} {row['chosen']}"
    rows[5] = dict(rows[4])
    rows[6]["prompt"] = HOSTILE + "\ufffd"
    folder = tmp_path / "<img src=x onerror=alert(3)>"
    folder.mkdir()
    return render_page(run_audit(write(folder / "rows.jsonl", rows)))


def test_data_is_inert_in_the_page(tmp_path: Path) -> None:
    page = parse(hostile_page(tmp_path))
    assert len(page.scripts) == 3  # the figures, plotly, and the page's own
    assert not [tag for tag, _ in page.tags if tag in {"img", "iframe", "object", "link", "form"}]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text  # shown as text
    figures = json.loads(page.scripts[0])
    labels = [label for figure in figures.values() for trace in figure["traces"] for label in trace.get("y", []) if isinstance(label, str)]
    assert any("alert" in label for label in labels)
    assert not any("<" in label for label in labels)  # plotly would read tags


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = parse(hostile_page(tmp_path))
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in {"src", "href"}]
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in hostile_page_style(page)


def hostile_page_style(page: Page) -> str:
    return page.text  # the parser gives style as text


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["audit", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_report_goes_to_stdout_and_json_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", dirty_rows())
    code, out, _ = run(capsys, path)
    assert code == 0
    assert "[warning] duplicates: 1 (1.7 %)" in out
    assert f"rows: {path}:21" in out
    code, out, err = run(capsys, path, "--json")
    assert code == 0
    facts = json.loads(out)
    assert {item["code"] for item in facts["findings"]} >= {"empty_answer", "duplicates", "replacement_character"}
    assert facts["format"] == 1
    assert "duplicates" in err


def test_strict_fails_on_findings_and_passes_on_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", dirty_rows())
    code, out, _ = run(capsys, path, "--strict")
    assert code == EXIT_USER
    assert "--strict: " in out
    clean = write(tmp_path / "clean.jsonl", plain_rows(60))
    assert run(capsys, clean, "--strict")[0] == 0


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dirty_rows()
    path = write(tmp_path / "rows.jsonl", [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows])
    held_out = write(tmp_path / "test.jsonl", [{"q": rows[3]["prompt"], "good": "a", "bad": "b"}])
    bench = write(tmp_path / "bench.jsonl", [{"prompt": rows[4]["prompt"]}])
    column_map = "prompt=q,chosen=good,rejected=bad"
    code, out, _ = run(
        capsys, path, "--column_map", column_map, "--eval", held_out, "--benchmark", bench, "--json", "--html", tmp_path / "page.html",
        "--write-clean", tmp_path / "clean.jsonl", "--keep", "duplicates", "--workers", 1,
    )  # fmt: skip
    assert code == 0
    facts = json.loads(out)
    counts = {item["code"]: item["num_rows"] for item in facts["findings"]}
    assert counts["evaluation_overlap"] == counts["benchmark_overlap"] == 1
    assert facts["clean"]["num_written"] == 60 - 4
    assert set(json.loads((tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()[0])) == {"q", "good", "bad"}
    assert re.search(r"<h1>Audit of .*rows\.jsonl</h1>", (tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "place"),
    [('{"prompt": "a", "chosen": "b"\n', ":1:30"), ('{"prompt": 1}\n{"x"', ":2:5"), ("\xff", ":1")],
)
def test_broken_files_exit_with_2_and_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, place: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    code, out, err = run(capsys, path)
    assert code == EXIT_USER
    assert f"{path}{place}" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-file.jsonl"],
        ["rows.jsonl", "--cross_fit", "3"],
        ["rows.jsonl", "--html", "no/such/folder/page.html"],
        ["rows.jsonl", "--keep", "duplicates"],
        ["rows.jsonl", "--column_map", "[prompt]"],
        ["rows.jsonl", "--scenario_column", "nope"],
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_arguments_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    write(tmp_path / "rows.jsonl", plain_rows(20))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == EXIT_USER
    assert "Traceback" not in out + err


@pytest.mark.parametrize("flags", [[], ["--json"], ["--strict"]])
def test_rows_of_which_none_can_be_used_are_no_success(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Q{n}?", "chosen": "", "rejected": "b"}) + "\n" for n in range(40)))
    assert main(["audit", str(path), "--workers", "1", *flags]) == 2
    assert "no row of 40 can be trained on" in "".join(capsys.readouterr())


def test_a_few_pairs_are_not_called_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "What is the sky like?", "chosen": "It is high and blue.", "rejected": "No idea."}) + "\n")
    assert main(["audit", str(path), "--workers", "1"]) == 0
    said = "".join(capsys.readouterr())
    assert "would hurt" not in said
    assert "that takes 50 pairs" in said
