"""Splits: an unknown one is refused whatever the rows lie in, and a slice is the same rows everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo.data.formats import load_preferences
from orpo.data.reading.sources import read_source
from orpo.data.reading.splits import split_of_file
from orpo.errors import DataError

ROWS = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
TRAIN, TEST = ROWS[:15], ROWS[15:]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _lines(folder: Path) -> Any:
    (folder / "pairs.jsonl").write_text(lines(TRAIN))
    return folder / "pairs.jsonl"


def _array(folder: Path) -> Any:
    (folder / "pairs.json").write_text(json.dumps(TRAIN))
    return folder / "pairs.json"


def _wrapped(folder: Path) -> Any:
    (folder / "pairs.json").write_text(json.dumps({"data": TRAIN}))
    return folder / "pairs.json"


def _columns(folder: Path) -> Any:
    (folder / "pairs.json").write_text(json.dumps({key: [row[key] for row in TRAIN] for key in TRAIN[0]}))
    return folder / "pairs.json"


def _csv(folder: Path) -> Any:
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in TRAIN))
    return folder / "pairs.csv"


def _parquet(folder: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TRAIN), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def _arrow(folder: Path) -> Any:
    import pyarrow

    table = pyarrow.Table.from_pylist(TRAIN)
    with pyarrow.OSFile(str(folder / "pairs.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "pairs.arrow"


def _unnamed_folder(folder: Path) -> Any:
    (folder / "a.jsonl").write_text(lines(TRAIN[:7]))
    (folder / "b.jsonl").write_text(lines(TRAIN[7:]))
    return folder


def _unnamed_pattern(folder: Path) -> Any:
    return str(_unnamed_folder(folder) / "*.jsonl")


def _saved(folder: Path) -> Any:
    import datasets

    datasets.Dataset.from_list(TRAIN).save_to_disk(folder / "saved")
    return folder / "saved"


def _data_set(folder: Path) -> Any:
    import datasets

    return datasets.Dataset.from_list(TRAIN, split="train")


def _frame(folder: Path) -> Any:
    import pandas

    return pandas.DataFrame([{**row, "split": "x"} for row in TRAIN])


def _generator(folder: Path) -> Any:
    return (row for row in TRAIN)


ONE_SPLIT: list[Callable[[Path], Any]] = [
    *(_lines, _array, _wrapped, _columns, _csv, _parquet, _arrow, _unnamed_folder, _unnamed_pattern),
    *(_saved, _data_set, _frame, _generator, lambda folder: TRAIN),
]


def _named_folder(folder: Path) -> Any:
    (folder / "train.jsonl").write_text(lines(TRAIN))
    (folder / "test.jsonl").write_text(lines(TEST))
    return folder


def _named_pattern(folder: Path) -> Any:
    return str(_named_folder(folder) / "t*.jsonl")


def _named_lists(folder: Path) -> Any:
    (folder / "pairs.json").write_text(json.dumps({"train": TRAIN, "test": TEST}))
    return folder / "pairs.json"


def _saved_both(folder: Path) -> Any:
    _both(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def _both(folder: Path) -> Any:
    import datasets

    return datasets.DatasetDict({"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)})


TWO_SPLITS: list[Callable[[Path], Any]] = [
    *(_named_folder, _named_pattern, _named_lists, _saved_both, _both, lambda folder: {"train": TRAIN, "test": TEST}),
]
WRONG = ("validation", "TRAIN", "eval", "nothing", "train[10]", "train[a:b]", "nothing[:3]", "train+test")
SLICES: list[tuple[str, slice]] = [
    ("[:10]", slice(None, 10)),
    ("[3:]", slice(3, None)),
    ("[-4:]", slice(-4, None)),
    ("[:-4]", slice(-15, -4)),
    ("[20%:60%]", slice(3, 9)),
    ("[-20%:]", slice(-3, None)),
    ("[:]", slice(None)),
]


def rows_of(source: Any, split: str | None = None) -> list[Any]:
    return [{key: row[key] for key in TRAIN[0]} for _, row in read_source(source, split)]


def named(makers: list[Any]) -> Any:
    return pytest.mark.parametrize("make", makers, ids=lambda make: make.__name__.strip("_<>"))


@named([*ONE_SPLIT, *TWO_SPLITS])
@pytest.mark.parametrize("split", WRONG)
def test_an_unknown_split_is_refused(make: Callable[[Path], Any], split: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        list(read_source(make(tmp_path), split))


@named(ONE_SPLIT)
def test_rows_without_splits_are_train_alone(make: Callable[[Path], Any], tmp_path: Path) -> None:
    assert rows_of(make(tmp_path), "train") == TRAIN
    with pytest.raises(DataError, match="no split 'test'") as caught:
        rows_of(make(tmp_path), "test")
    assert "eval_fraction" in str(caught.value)


@named([*ONE_SPLIT, *TWO_SPLITS])
@pytest.mark.parametrize(("text", "meant"), SLICES, ids=[text for text, _ in SLICES])
def test_a_slice_is_the_same_rows_everywhere(make: Callable[[Path], Any], text: str, meant: slice, tmp_path: Path) -> None:
    assert rows_of(make(tmp_path), f"train{text}") == TRAIN[meant]
    if make in ONE_SPLIT:
        assert rows_of(make(tmp_path), text) == TRAIN[meant]


@named(TWO_SPLITS)
def test_splits_by_name(make: Callable[[Path], Any], tmp_path: Path) -> None:
    assert rows_of(make(tmp_path), "test") == TEST
    assert rows_of(make(tmp_path), "test[1:3]") == TEST[1:3]


def test_two_halves_of_a_file_are_the_whole(tmp_path: Path) -> None:
    path = _lines(tmp_path)
    for share in range(0, 101, 7):
        assert rows_of(path, f"train[:{share}%]") + rows_of(path, f"train[{share}%:]") == TRAIN


@pytest.mark.parametrize("name", ["test.jsonl", "help-desk-test.jsonl.gz", "eval.jsonl", "heldout-1.csv"])
def test_a_file_that_says_it_is_the_test_split(tmp_path: Path, name: str) -> None:
    import gzip

    text = _csv(tmp_path).read_text() if ".csv" in name else lines(TRAIN)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert rows_of(tmp_path / name, "test") == TRAIN
    assert rows_of(tmp_path / name) == TRAIN
    with pytest.raises(DataError, match="no split 'validation': it has"):
        rows_of(tmp_path / name, "validation")


def test_rows_called_eval_stand_in_for_test_and_not_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines(TRAIN))
    (tmp_path / "eval.jsonl").write_text(lines(TEST))
    assert rows_of(tmp_path, "test") == rows_of(tmp_path, "eval") == TEST
    (tmp_path / "test.jsonl").write_text(lines(TEST[:2]))
    assert (rows_of(tmp_path, "test"), rows_of(tmp_path, "eval")) == (TEST[:2], TEST)
    assert split_of_file(tmp_path / "eval.jsonl", tmp_path) == "eval"


@pytest.mark.parametrize("split", ["validation", "TRAIN", "eval", "nothing"])
def test_the_packaged_rows(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"orpo-demo: no split '{split}': it has test, train"):
        rows_of("orpo-demo", split)
    assert rows_of("orpo-demo", "train[:10]") == rows_of("orpo-demo")[:10]
    assert rows_of("orpo-demo", "test[-5:]") == rows_of("orpo-demo", "test")[-5:]


def test_a_mix_takes_its_slices(tmp_path: Path) -> None:
    path = str(_lines(tmp_path))
    mix = [{"path": path, "split": "train[:2]"}, {"path": path, "split": "train[-3:]"}]
    preferences, _, _ = load_preferences(mix, split="train")
    assert [preference.prompt for preference in preferences] == [row["prompt"] for row in [*TRAIN[:2], *TRAIN[-3:]]]
