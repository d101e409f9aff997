"""What each broken row or file leads to."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo.cli import main
from orpo.data.formats import load_preferences
from orpo.data.reading.sources import read_source
from orpo.errors import EXIT_USER, DataError

GOOD = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
GOOD_MESSAGES = {
    "prompt": [{"role": "user", "content": "Q?"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def only_reason(path: Path) -> str:
    """The reason of the one dropped row of a file, which is also what `strict` stops with, at file and line."""
    preferences, dropped, _ = load_preferences(path)
    assert preferences
    (item,) = dropped
    with pytest.raises(DataError) as caught:
        load_preferences(path, strict=True)
    assert str(caught.value).startswith(f"{path}:{item.where.line}: {item.reason}")
    assert caught.value.exit_code == EXIT_USER
    return item.reason


BLANKS = ["", " ", "\n\t\r ", "\u00a0\u2003\u3000", "\u200b", "\ufeff\u2060"]


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_1_blank_text(tmp_path: Path, field: str, blank: str) -> None:
    reason = only_reason(write(tmp_path / "rows.jsonl", GOOD, {**GOOD, field: blank}))
    assert reason == ("empty_prompt" if field == "prompt" else "empty_answer")


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_1_blank_messages(tmp_path: Path, field: str, blank: str) -> None:
    row = json.loads(json.dumps(GOOD_MESSAGES))
    row[field][0]["content"] = blank
    reason = only_reason(write(tmp_path / "rows.jsonl", GOOD_MESSAGES, row))
    assert reason == ("empty_prompt" if field == "prompt" else "empty_answer")


@pytest.mark.parametrize("is_absent", [True, False])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_2_null_or_absent_field(tmp_path: Path, field: str, is_absent: bool) -> None:
    row = {key: value for key, value in GOOD.items() if key != field}
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD, row if is_absent else {**row, field: None})
    assert only_reason(path) == "missing_field"
    _, (item,), _ = load_preferences(path)
    assert (item.where.row, item.where.line) == (2, 3)
    assert field in item.detail


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (("prompt", "chosen"), ["no column for the rejected answer", "'prompt', 'chosen'", "'rejected' beside 'chosen'"]),
        (("prompt", "rejected"), ["no column for the chosen answer"]),
        (("prompt", "choosen", "rejected"), ["no column for the chosen answer", "column_map: {chosen: choosen}"]),
        (("prompt", "chosen", "rejectd"), ["no column for the rejected answer", "column_map: {rejected: rejectd}"]),
        (("promt", "chosen", "rejected"), ["no column for the prompt", "column_map: {prompt: promt}"]),
        (("chosen", "rejected"), ["no column for the prompt"]),
        (("prompt", "choosen", "rejectd"), ["column_map: {chosen: choosen, rejected: rejectd}"]),
    ],
)
def test_3_missing_column(tmp_path: Path, columns: tuple[str, ...], said: list[str]) -> None:
    path = write(tmp_path / "rows.jsonl", *[dict.fromkeys(columns, "text")] * 3)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    for part in (str(path), "found:", "expected:", "to mend it:", *said):
        assert part in str(caught.value)


def test_3_a_column_that_is_null_throughout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'rejected' is null in every row"):
        load_preferences(write(tmp_path / "rows.jsonl", *[{**GOOD, "rejected": None}] * 3))


@pytest.mark.parametrize("value", [True, 0, 3.5, ["x"], [["x"]], {"a": "x"}], ids=repr)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_4_wrong_type(tmp_path: Path, field: str, value: Any) -> None:
    reason = only_reason(write(tmp_path / "rows.jsonl", GOOD, GOOD, {**GOOD, field: value}))
    assert reason in {"wrong_type", "bad_messages"}


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_5_bom_and_crlf_are_accepted(tmp_path: Path, ending: str) -> None:
    if ending == "csv":
        text = "prompt,chosen,rejected\r\nQ?,good,bad\r\n"
    elif ending == "json":
        text = "[\r\n" + json.dumps(GOOD) + "\r\n]\r\n"
    else:
        text = json.dumps(GOOD) + "\r\n" + json.dumps(GOOD) + "\r\n"
    raw = b"\xef\xbb\xbf" + text.encode()
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert [row for _, row in read_source(path)] == [GOOD] * text.count("good")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_5_invalid_utf8_stops_at_its_line(tmp_path: Path, ending: str) -> None:
    if ending == "csv":
        raw = b"prompt,chosen,rejected\nQ?,good,bad\nQ\xe9?,good,bad\n"
    elif ending == "json":
        raw = b"[\n" + json.dumps(GOOD).encode() + b',\n{"prompt": "Q\xe9"}]'
    else:
        raw = json.dumps(GOOD).encode() + b"\n\n" + json.dumps(GOOD).encode().replace(b"Q", b"\xe9")
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    with pytest.raises(DataError, match="byte 0xe9 is not valid UTF-8") as caught:
        load_preferences(path)
    column = {"csv": 2, "json": 14}.get(ending, json.dumps(GOOD).index("Q") + 1)
    assert str(caught.value).startswith(f"{path}:3:{column}: ")
    assert caught.value.exit_code == EXIT_USER


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_5_other_encodings_are_named(tmp_path: Path, encoding: str, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(json.dumps(GOOD) if ending != "csv" else "prompt,chosen,rejected\na,b,c\n", encoding=encoding)
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_preferences(path)


BROKEN = {
    "cut line": ("jsonl", json.dumps(GOOD) + '\n{"prompt": "Q?", "chosen"', ":2:26:"),
    "single quotes": ("jsonl", json.dumps(GOOD) + "\n\n{'prompt': 'Q?'}\n", ":3:2:"),
    "two objects in a line": ("jsonl", json.dumps(GOOD) + '\n{"a": 1} {"b": 2}', ":2:10:"),
    "trailing comma": ("json", "[\n" + json.dumps(GOOD) + ",\n]", ":3:1:"),
    "missing comma": ("json", "[\n" + json.dumps(GOOD) + "\n  " + json.dumps(GOOD) + "]", ":3:3:"),
    "cut array": ("json", "[\n" + json.dumps(GOOD) + ",\n" + '{"prompt": "Q?"', ":3:16:"),
    "unclosed array": ("json", "[" + json.dumps(GOOD), f":1:{len(json.dumps(GOOD)) + 2}:"),
    "text after the array": ("json", "[" + json.dumps(GOOD) + "]\nx", ":2:1:"),
    "bad value": ("json", '{"data": [\n{"prompt": nope}]}', ":2:12:"),
    "control character": ("jsonl", json.dumps(GOOD) + '\n{"prompt": "a\tb"}', ":2:14:"),
    "open quote": ("csv", 'prompt,chosen,rejected\nQ?,good,bad\nQ?,"good,bad\nQ?,good,bad\n', ":3:4:"),
    "text after a quote": ("csv", 'prompt,chosen,rejected\nQ?,"good"er,bad\n', ":2:10:"),
    "text after a quote, lines down": ("csv", 'prompt,chosen,rejected\n"Q ""x""\n?","goo\nd" er,bad\n', ":4:3:"),
    "semicolons, open quote": ("csv", 'prompt;chosen;rejected\n"a,b";"c""d";"e\n', ":2:14:"),
    "tabs": ("tsv", 'prompt\tchosen\trejected\na\t"b"c\td\n', ":2:6:"),
}


@pytest.mark.parametrize(("ending", "text", "place"), BROKEN.values(), ids=BROKEN)
def test_6_broken_files_name_their_place(tmp_path: Path, ending: str, text: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="broken") as caught:
        load_preferences(path)
    assert str(caught.value).startswith(f"{path}{place} broken"), caught.value
    assert main(["audit", str(path), "--workers", "1"]) == EXIT_USER
    out, err = capsys.readouterr()
    assert not out
    assert f"{path}{place} broken" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("ending", ["jsonl.gz", "parquet", "arrow", "feather"])
@pytest.mark.parametrize("content", [b"", b"not this format at all", None], ids=["empty", "other", "cut"])
def test_6_damaged_binary_files(tmp_path: Path, ending: str, content: bytes | None) -> None:
    path = tmp_path / f"rows.{ending}"
    if content is None:
        import pyarrow as pa
        import pyarrow.feather as feather
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([GOOD] * 5000)
        if ending == "jsonl.gz":
            path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 500, mtime=0))
        elif ending == "parquet":
            pq.write_table(table, path)
        else:
            feather.write_feather(table, path, compression="uncompressed")
        content = path.read_bytes()
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    assert str(path) in str(caught.value)
    assert main(["audit", str(path), "--workers", "1"]) == EXIT_USER


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_6_empty_files(tmp_path: Path, ending: str, content: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="empty"):
        load_preferences(path)


@pytest.mark.parametrize("content", ["[]", '{"data": []}', "prompt,chosen,rejected\n"])
def test_6_files_without_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("rows.csv" if content.startswith("prompt") else "rows.json")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        load_preferences(path)


# ru_maxrss would not do: a process takes over the peak of the one that started it (getrusage(2) counts from the fork on).
_READ_UNDER_LIMIT = """
import sys
import pyarrow.parquet
from orpo.data.formats import load_preferences
def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak_kib()
preferences, dropped, _ = load_preferences(sys.argv[1])
print(len(preferences), [(d.reason, d.where.row) for d in dropped], peak_kib() - before)
"""
# The limit of a row is 16 MiB of bytes: held as bytes, as text and as a growing buffer (of four bytes a character in the csv module).
# The row itself has 50 MiB, which parquet's own reader takes in as one page and decodes.
_MOST_MIB = {"jsonl": 60, "json": 100, "csv": 150, "jsonl.gz": 60, "arrow": 60, "parquet": 300}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("ending", _MOST_MIB)
def test_7_a_row_of_50_megabytes_is_dropped_in_bounded_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    long = ('some words, "quoted" ' * 10 + "\n") * (50 * 2**20 // 211)
    if ending in {"arrow", "parquet"}:
        import pyarrow as pa
        import pyarrow.feather as feather
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([GOOD, {**GOOD, "chosen": long}, GOOD])
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            feather.write_feather(table, path, compression="uncompressed")
    elif ending == "csv":
        text = f'prompt,chosen,rejected\nQ?,good,bad\nQ?,"{long.replace(chr(34), chr(34) * 2)}",bad\nQ?,good,bad\n'
    else:
        lines = [json.dumps(row) for row in (GOOD, {**GOOD, "chosen": long}, GOOD)]
        text = "[" + ",\n".join(lines) + "]" if ending == "json" else "\n".join(lines)
    if ending not in {"arrow", "parquet"}:
        path.write_bytes(gzip.compress(text.encode(), 1) if ending.endswith("gz") else text.encode())
    done = subprocess.run([sys.executable, "-c", _READ_UNDER_LIMIT, str(path)], capture_output=True, text=True, check=True)
    told, kib = done.stdout.rsplit(maxsplit=1)
    assert told == "2 [('row_too_large', 1)]"
    assert int(kib) < _MOST_MIB[ending] * 1024


# One process for both, the small file first: what it peaks at is what the large one's peak is held against.
_AUDITS = """
import sys
from orpo.cli import main
for source in sys.argv[1:]:
    code = main(["audit", source, "--write-clean", source.replace(".jsonl", "-clean.jsonl")])
    print(code, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_7_the_audit_of_such_a_row_takes_no_more_memory_and_cleans_it_away(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, "chosen": "words " * (50 * 2**20 // 6)}, {**GOOD, "prompt": "R?"})
    small = write(tmp_path / "small.jsonl", GOOD, {**GOOD, "prompt": "R?"})
    done = subprocess.run([sys.executable, "-c", _AUDITS, str(small), str(path)], capture_output=True, text=True, check=True)
    told = [line.split() for line in done.stdout.splitlines() if re.fullmatch(r"\d+ \d+", line)]
    assert [code for code, _ in told] == ["0", "0"], done.stdout
    assert (tmp_path / "rows-clean.jsonl").read_bytes() == (tmp_path / "small-clean.jsonl").read_bytes()
    assert int(told[1][1]) - int(told[0][1]) < 60 * 1024


def test_8_identical_answers_are_dropped_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {**GOOD, "rejected": " good\n"}
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 99, same)
    assert only_reason(path) == "identical_answers"
    assert "same answer on both sides" not in caplog.text
    load_preferences(write(tmp_path / "more.jsonl", *[GOOD] * 98, same, same))
    assert "2.0 % of the rows have the same answer on both sides" in caplog.text


def test_18_prompts_that_differ_inside_a_pair(tmp_path: Path) -> None:
    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    good = {"chosen": talk("Q?", "good"), "rejected": talk("Q?", "bad")}
    bad = {"chosen": talk("Q?", "good"), "rejected": talk("R?", "bad")}
    longer = {"chosen": talk("Q?", "x") + talk("S?", "good"), "rejected": talk("Q?", "y") + talk("S?", "bad")}
    assert only_reason(write(tmp_path / "a.jsonl", good, bad)) == "prompts_differ"
    assert only_reason(write(tmp_path / "b.jsonl", good, longer)) == "prompts_differ"
    stated = [{"prompt": "Q?", **good}, {"prompt": "T?", **good}]
    assert only_reason(write(tmp_path / "c.jsonl", *stated)) == "prompts_differ"


def test_19_nothing_left_stops_with_the_histogram(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {**GOOD, "chosen": ""}, {**GOOD, "chosen": " "}, {**GOOD, "chosen": "bad"})
    with pytest.raises(DataError, match=r"no row can be trained on: 2 empty_answer: .*; 1 identical_answers") as caught:
        load_preferences(path)
    assert str(path) in str(caught.value)
    assert f"(first: {path}:1, chosen)" in str(caught.value)


KTO = [{"prompt": "Q?", "completion": "x", "label": True}, {"prompt": "Q?", "completion": "y", "label": False}]
UNUSABLE = {
    "KTO": (KTO, "unpaired rows (KTO)"),
    "KTO with 0 and 1": ([{"prompt": "Q?", "response": "x", "label": value} for value in (0, 1)], "unpaired rows (KTO)"),
    "KTO, LLaMA-Factory": ([{"instruction": "Q?", "output": "x", "kto_tag": True}], "unpaired rows (KTO)"),
    "unlabelled": ([{"prompt": "Q?", "response_a": "x", "response_b": "y"}], "nothing that says which is better"),
    "unlabelled list": ([{"prompt": "Q?", "responses": ["x", "y"]}], "nothing that says which is better"),
    "instruction-only": ([{"instruction": "Q?", "output": "x"}], "instruction-only rows"),
    "prompts only": ([{"prompt": "Q?"}], "prompts without answers"),
}


@pytest.mark.parametrize(("rows", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_20_unpaired_or_unlabelled_data(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    for part in (str(path), message, "expected:", "to mend it:"):
        assert part in str(caught.value)


def test_20_kto_says_how_many_prompts_could_be_paired(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 prompts with answers of both kinds"):
        load_preferences(write(tmp_path / "rows.jsonl", *KTO))
