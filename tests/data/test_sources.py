"""Places that rows come from: files of every format, folders, globs, objects, mixes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo.data.formats import load_preferences, stream_preferences
from orpo.data.reading.jsonfiles import read_json_array
from orpo.data.reading.sources import Source, as_sources, read_source
from orpo.data.types import Dropped, Preference
from orpo.errors import DataError

ROWS = [{"prompt": f"Q{i}?", "chosen": f'good {i}, "quoted"\nü\u2028', "rejected": f"bad {i}"} for i in range(5)]


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_csv(path: Path, delimiter: str = ",") -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(ROWS[0])] + [delimiter.join(map(cell, row.values())) for row in ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow_stream(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_file(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": write_jsonl,
    "lines_named.json": write_jsonl,
    "rows.jsonl.gz": write_gz,
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "array_named.jsonl": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8"),
    "splits.json": lambda path: path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}), encoding="utf-8"),
    "columns.json": lambda path: path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), encoding="utf-8"),
    "rows.csv": write_csv,
    "semicolons.csv": lambda path: write_csv(path, ";"),
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow_stream,
    "rows.feather": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert [row for _, row in read_source(tmp_path / name)] == ROWS
    preferences, dropped, _ = load_preferences(str(tmp_path / name))
    assert [(p.prompt, *p.responses) for p in preferences] == [tuple(row.values()) for row in ROWS]
    assert not dropped


def test_lines_are_counted_for_messages_to_the_user(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + b"".join(json.dumps(row).encode() + b"\r\n" for row in ROWS[:2]) + b"  \n" + json.dumps(ROWS[2]).encode())
    assert [(where.line, where.row) for where, _ in read_source(path)] == [(2, 0), (3, 1), (5, 2)]
    array = tmp_path / "rows.json"
    array.write_text("[\n" + ",\n\n".join(json.dumps(row, indent=1) for row in ROWS[:3]) + "\n]\n", encoding="utf-8")
    assert [where.line for where, _ in read_source(array)] == [2, 8, 14]
    table = tmp_path / "rows.csv"
    write_csv(table)
    assert [where.line for where, _ in read_source(table)] == [2, 4, 6, 8, 10]  # a quoted line end in each record


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c"])
def test_raw_line_separators_inside_strings_are_text(tmp_path: Path, separator: str) -> None:
    rows = [{"prompt": f"a{separator}b", "chosen": "x", "rejected": "y"}] * 2
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if ord(separator) >= 32:  # JSON itself demands escapes for the control characters below
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
        assert [row for _, row in read_source(tmp_path / "rows.jsonl")] == rows
    (tmp_path / "rows.csv").write_text(f'prompt,chosen,rejected\n"a{separator}b",x,y\n', encoding="utf-8", newline="")
    assert [row for _, row in read_source(tmp_path / "rows.csv")] == rows[:1]


def test_folders_by_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[2:4])
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:2])
    (tmp_path / "validation").mkdir()
    write_jsonl(tmp_path / "validation" / "part.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "train.jsonl", ROWS)
    assert [row for _, row in read_source(tmp_path)] == ROWS[:4]
    assert [row for _, row in read_source(tmp_path, "train")] == ROWS[:4]
    assert [row for _, row in read_source(tmp_path, "dev")] == ROWS[4:]
    with pytest.raises(DataError, match=r"no split 'test': it has train, validation"):
        read_source(tmp_path, "test")


def test_a_folder_without_split_names_is_read_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    assert [row for _, row in read_source(str(tmp_path))] == ROWS
    assert [row for _, row in read_source(str(tmp_path / "*.jsonl"))] == ROWS
    with pytest.raises(DataError, match="nothing here names a split"):
        read_source(tmp_path, "test")


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert [row for _, row in read_source(tmp_path / "both")] == ROWS
    assert [row for _, row in read_source(tmp_path / "both", "test")] == ROWS[:1]
    assert [row for _, row in read_source(tmp_path / "one")] == ROWS


def test_objects() -> None:
    import datasets
    import pandas
    import pyarrow

    data = datasets.Dataset.from_list(ROWS)
    forms: list[Any] = [
        ROWS,
        tuple(ROWS),
        data,
        data.with_format("numpy"),
        data.to_iterable_dataset(),
        datasets.DatasetDict({"train": data}),
        {"train": data, "test": data.select([0])},
        pyarrow.Table.from_pylist(ROWS),
        pandas.DataFrame(ROWS),
        (row for row in ROWS),
    ]
    for form in forms:
        assert [row for _, row in read_source(form)] == ROWS, type(form)
    assert [row for _, row in read_source(forms[6], "test")] == ROWS[:1]
    with pytest.raises(DataError, match="several splits and none named 'train'"):
        read_source({"a": data, "b": data})
    with pytest.raises(DataError, match="holds no rows"):
        read_source(7)


def test_a_hub_id_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(DataError, match="neither a file or folder here nor a data set"):
        read_source("nobody/nothing-of-this-name")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options["revision"], options["streaming"]))
        train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
        if options["streaming"]:
            return datasets.IterableDatasetDict({"train_prefs": train.to_iterable_dataset(), "test_prefs": test.to_iterable_dataset()})
        return datasets.DatasetDict({"train_prefs": train, "test_prefs": test})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("owner/pairs", split="train_prefs", name="default", revision="abc")
    rows = list(read_source(source, streaming=streaming))
    assert [row for _, row in rows] == ROWS
    assert str(rows[2][0]) == "owner/pairs[train_prefs] row 2"
    assert asked == [("owner/pairs", "default", "abc", streaming)]
    with pytest.raises(DataError, match="it has train_prefs, test_prefs"):
        read_source("owner/pairs", "dev")
    with pytest.raises(DataError, match="several splits and none named 'train'"):
        read_source("owner/pairs")


@pytest.mark.parametrize(("spec", "hint"), [("rows.jsnl", "rows.jsonl"), ("./nothing", "check the path"), ("a/b/c", "check the path")])
def test_a_missing_path_suggests_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, hint: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_source(spec if spec != "rows.jsnl" else str(tmp_path / spec))
    assert hint in str(caught.value)


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"unknown ending '\.xlsx'"):
        read_source(tmp_path / "rows.xlsx")


def test_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", [{"question": "R?", "preferred": "x", "rejected": "y"}])
    preferences, _, shape = load_preferences([tmp_path / "a.jsonl", {"path": str(tmp_path / "b.jsonl")}])
    assert [p.prompt for p in preferences] == ["Q0?", "Q1?", "R?"]
    assert "a.jsonl" in shape.description
    assert "b.jsonl" in shape.description


def test_weights_hold_and_no_row_is_used_twice() -> None:
    def rows(letter: str, number: int) -> list[dict[str, str]]:
        return [{"prompt": f"{letter}{i}", "chosen": "x", "rejected": "" if i == 0 else "y"} for i in range(number)]

    mix = [Source(rows("a", 100), weight=3), Source(rows("b", 10), weight=1)]
    items = list(stream_preferences(mix))
    prompts = [item.prompt for item in items if isinstance(item, Preference)]
    assert len(prompts) == len(set(prompts))
    assert sum(prompt[0] == "b" for prompt in prompts) == 9  # the dropped row does not count
    assert 27 <= sum(prompt[0] == "a" for prompt in prompts) <= 30
    for end in range(4, len(prompts), 4):
        assert abs(sum(prompt[0] == "b" for prompt in prompts[:end]) - end / 4) <= 1
    assert sum(isinstance(item, Dropped) for item in items) == 2


def test_wrong_sources_are_refused() -> None:
    with pytest.raises(DataError, match="did you mean 'weight'"):
        as_sources([{"path": "a", "wieght": 1}])
    with pytest.raises(DataError, match="some sources have a weight"):
        load_preferences([Source(ROWS, weight=1), Source(ROWS)])
    for weight in (0, -1, float("nan"), float("inf"), True):
        with pytest.raises(DataError, match="weight"):
            Source(ROWS, weight=weight)
    with pytest.raises(DataError, match="empty"):
        as_sources([])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4),
    max_leaves=12,
)
ROW_LISTS = st.lists(JSON, min_size=1, max_size=8)
RECORDS = st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r")), min_size=3, max_size=3), min_size=1, max_size=5)


@given(rows=ROW_LISTS, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), chunk=st.integers(1, 40))
def test_arrays_are_read_as_the_json_module_reads_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    monkeypatch.setattr("orpo.data.reading.jsonfiles._CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert [value for _, value in read_json_array(lambda: path.open("rb"), "rows.json", 1 << 20)] == rows


@given(rows=ROW_LISTS, cut=st.integers(0, 200), chunk=st.integers(1, 40))
def test_a_cut_array_is_refused_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[Any], cut: int, chunk: int
) -> None:
    monkeypatch.setattr("orpo.data.reading.jsonfiles._CHUNK_BYTES", chunk)
    text = json.dumps(rows)
    path = tmp_path / "rows.json"
    path.write_text(text[: min(cut, len(text) - 1)], encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json(:\d+:\d+)?: (broken JSON|the file is empty)"):
        list(read_source(path))


@given(rows=ROW_LISTS)
def test_lines_are_read_as_the_json_module_reads_them(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"first": 1}, *rows]), encoding="utf-8")
    assert [value for _, value in read_source(path)][1:] == rows


@given(
    cells=st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r")), min_size=3, max_size=3), min_size=1, max_size=5)
)
def test_csv_records_round_trip(tmp_path: Path, cells: list[list[str]]) -> None:
    path = tmp_path / "rows.csv"
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in record) for record in cells]
    path.write_text("\n".join(["prompt,chosen,rejected", *quoted]) + "\n", encoding="utf-8", newline="")
    assert [list(row.values()) for _, row in read_source(path)] == cells


def test_large_rows_are_dropped_and_their_neighbours_kept(tmp_path: Path) -> None:
    big = {"prompt": "Q?", "chosen": 'x, "y"\n[{' * 4000, "rejected": "bad"}
    rows = [ROWS[0], big, ROWS[1]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    header, *records = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [ROWS[0], *(r.values() for r in rows)]]
    (tmp_path / "rows.csv").write_text("\n".join([header, *records]), encoding="utf-8")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
        found = [row for _, row in read_source(tmp_path / name, max_row_bytes=10_000)]
        assert found[::2] == ROWS[:2], name
        assert isinstance(found[1], Dropped), name
        assert found[1].reason == "row_too_large"


def test_streaming_reads_no_more_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [*ROWS * 400, "broken"])
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken")
    stream = stream_preferences(path)
    assert [next(stream) for _ in range(1500)]
    with pytest.raises(DataError, match="broken JSON"):
        list(stream)


def test_reading_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl")
    code = (
        "import sys; from orpo.data.formats import load_preferences; load_preferences(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
