"""Token groups on disk and their cache: what is read back is what was made, by whoever made it, and nothing half is ever found."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.disks import small_disk
from orpo.data.dataset import DataReport, fingerprint, prepare_groups
from orpo.data.formats import stream_preferences
from orpo.data.settings import DataSettings
from orpo.data.stored.content import rows_key
from orpo.data.stored.groups import GroupsWriter, StoredGroups, as_batch
from orpo.data.stored.measures import measure
from orpo.data.stored.tokencache import FACTS_NAME, GROUPS_NAME, TokenCache, cache_folder
from orpo.data.stored.tokenise import Means, TokenisedRows, tokenise_source
from orpo.data.stored.workers import map_in_processes
from orpo.data.template import make_encoder
from orpo.data.types import TokenGroup
from orpo.errors import UserError
from randomgroups import random_groups
from tinymodels import CHATML_TEMPLATE, build_tiny_tokenizer

SETTINGS = DataSettings.of(
    {
        "pairs": "all",
        "sft_rows": True,
        "strict_data": False,
        "max_length": 256,
        "truncation": "keep_end",
        "special_tokens_in_text": "warn",
    }
)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command line sets up for its own lines would keep them from here."""
    monkeypatch.setattr(logging.getLogger("orpo"), "propagate", True)


def made_rows(number: int) -> Iterator[dict[str, Any]]:
    """Rows of many fates: pairs, dropped, trimmed, with further columns, with messages, special tokens, or said twice."""
    for i in range(number):
        row = {"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", "score": i / 7, "topic": "söme", "ok": True}
        kinds = {
            1: {**row, "chosen": " "},
            2: {**row, "prompt": "word " * 300},
            3: {**row, "chosen": row["rejected"]},
            4: {**row, "prompt": "a <|im_end|> b"},
            5: {**row, "prompt": "Question 0?", "chosen": "good 0", "rejected": "bad 0"},
            6: {**row, "chosen": "long " * 300},
        }
        yield kinds.get(i % 17, row)


def write_rows(path: Path, number: int = 60) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made_rows(number)), encoding="utf-8")
    return path


def tokenised(
    path: Any, cache: Path | None, num_processes: int = 1, settings: DataSettings = SETTINGS, open_rows: Any = None, **more: Any
) -> TokenisedRows:
    return tokenise_source(
        open_rows or (lambda: stream_preferences(path, pairs=settings.pairs, sft_rows=settings.sft_rows)),
        make_encoder(build_tiny_tokenizer(), settings),
        spec=path,
        split=None,
        settings=settings,
        means=Means(num_processes, None if cache is None else str(cache), rows_alone=256),
        **more,
    )


def shown(groups: Any) -> list[Any]:
    """All that groups are, to compare."""
    ids = [(group.prompt_ids.tolist(), [part.tolist() for part in group.response_ids]) for group in groups]
    rest = [(group.pairs, group.is_ended, group.where, group.notes, group.columns) for group in groups]
    types = [{str(group.prompt_ids.dtype), *(str(part.dtype) for part in group.response_ids)} for group in groups]
    return list(zip(ids, rest, types, strict=True))


# --- files -----------------------------------------------------------------------------------------------------------------------------


def write_groups(path: Path, groups: list[TokenGroup], at_a_time: int = 7) -> StoredGroups:
    writer = GroupsWriter(path)
    for start in range(0, len(groups), at_a_time):
        writer.add(as_batch(groups[start : start + at_a_time]))
    writer.close()
    assert writer.fingerprint == fingerprint(groups)
    return StoredGroups(path)


@settings(max_examples=25)
@given(number=st.integers(0, 30), seed=st.integers(0, 1000), at_a_time=st.integers(1, 40), chance=st.randoms())
def test_groups_come_back_as_they_were(tmp_path: Path, number: int, seed: int, at_a_time: int, chance: Any) -> None:
    groups = random_groups(number, seed=seed, kinds=("pair", "sft", "four", "partial"))
    stored = write_groups(tmp_path / "groups.arrow", groups, at_a_time)
    assert len(stored) == number
    assert shown(stored) == shown(groups)
    assert fingerprint(stored) == fingerprint(groups)
    some = np.flatnonzero([chance.random() < 0.5 for _ in groups])
    part, plain = stored.take(some), [groups[row] for row in some]
    twice = part.take(np.arange(0, len(some), 2))
    assert shown(part) == shown(plain)
    assert shown(twice) == shown(plain[::2])
    assert [fingerprint(part), fingerprint(twice)] == [fingerprint(plain), fingerprint(plain[::2])]
    assert list(part.places()) == [group.where for group in plain]
    for one, same in ((stored, groups), (part, plain)):
        for name, values in asdict(one.measures()).items():
            assert values.tolist() == asdict(measure(same))[name].tolist(), name
    assert shown(pickle.loads(pickle.dumps(part))) == shown(plain)  # noqa: S301  (as loaders with processes of their own do)


def test_rows_are_reached_like_those_of_a_list(tmp_path: Path) -> None:
    groups = random_groups(9)
    stored = write_groups(tmp_path / "groups.arrow", groups)
    assert shown(stored[2:20:3]) == shown(groups[2:20:3])
    assert shown([stored[-1]]) == shown([groups[-1]])
    with pytest.raises(IndexError):
        stored[9]
    with pytest.raises(ValueError, match="order"):
        stored.take(np.array([3, 1]))


def test_the_file_is_one_of_the_datasets_library(tmp_path: Path) -> None:
    from datasets import Dataset

    groups = random_groups(5)
    write_groups(tmp_path / "groups.arrow", groups)
    found = Dataset.from_file(str(tmp_path / "groups.arrow"))
    assert found.num_rows == 5
    assert found[1]["num_tokens"] == groups[1].num_tokens


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_counted_lengths_have_the_quantiles_of_the_lengths(lengths: list[int]) -> None:
    report = DataReport()
    for length, group in zip(lengths, random_groups(len(lengths)), strict=True):
        report.add(replace(group, prompt_ids=np.ones(length, dtype=np.int32)))
    found = report.lengths["prompt"]
    assert found["mean"] == round(float(np.mean(lengths)), 1)
    for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}.items():
        assert found[name] == np.quantile(lengths, share, method="higher")


# --- the cache -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_cache_gives_what_is_made_without_it(tmp_path: Path, num_processes: int) -> None:
    """At the first start and at the second; by one process and by several, which come in after the first rows."""
    path = write_rows(tmp_path / "rows.jsonl", 60 if num_processes == 1 else 800)
    encoder = make_encoder(build_tiny_tokenizer(), SETTINGS)
    groups, report = prepare_groups(stream_preferences(str(path), pairs="all", sft_rows=True), encoder)
    assert report.dropped
    assert report.notes
    assert report.num_duplicates
    for cache in (tmp_path / "cache", tmp_path / "cache", None):
        found = tokenised(str(path), cache, num_processes)
        assert isinstance(found.groups, list if cache is None else StoredGroups)
        assert shown(found.groups) == shown(groups)
        assert fingerprint(found.groups) == fingerprint(groups)
        assert found.report.to_dict() == report.to_dict()
        assert found.report.lines() == report.lines()
        assert found.prompts[groups[0].where] == "Question 0?"


def test_the_second_start_reads_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    notes, warnings = [], []
    for _ in range(2):
        caplog.clear()
        notes.append(tokenised(str(path), tmp_path / "cache").note)
        warnings.append([record.message for record in caplog.records if record.levelno >= logging.WARNING])
    assert "written to" in notes[0]
    assert "read from" in notes[1]
    assert any("special-token text" in text for text in warnings[0])
    assert warnings[0] == warnings[1]
    facts = TokenCache(tmp_path / "cache").facts()
    assert facts["num_sets"] == 1
    assert facts["num_bytes"] > 0


def key_of(path: Path, settings: DataSettings = SETTINGS, tokenizer: Any = None, split: str | None = None) -> str | None:
    encoder = make_encoder(tokenizer or build_tiny_tokenizer(), settings, date="2026-01-02T03:04:05")
    return rows_key(str(path), split, settings, encoder, TokenCache(path.parent / "cache").file_hash)


def test_the_key_changes_with_all_that_decides_ids(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    first = key_of(path)
    assert first == key_of(path)
    assert first == key_of(path, replace(SETTINGS, dataset_streaming=True))  # how rows are fetched
    other_template = CHATML_TEMPLATE.replace("assistant\n", "assistant: ")
    dated = CHATML_TEMPLATE + "{{ strftime_now('') }}"
    others = [
        *(key_of(path, replace(SETTINGS, **change)) for change in ({"max_length": 255}, {"pairs": "adjacent"}, {"sft_rows": False})),
        *(key_of(path, replace(SETTINGS, **change)) for change in ({"truncation": "drop"}, {"special_tokens_in_text": "split"})),
        *(key_of(path, replace(SETTINGS, **change)) for change in ({"max_prompt_length": 9}, {"chat_template": "none"})),
        key_of(path, replace(SETTINGS, column_map={"prompt": "chosen"})),
        key_of(path, tokenizer=build_tiny_tokenizer(vocab_size=300)),
        key_of(path, tokenizer=build_tiny_tokenizer(chat_template=other_template)),
        key_of(path, tokenizer=build_tiny_tokenizer(chat_template=dated)),
        key_of(path, split="train[:5]"),
    ]
    text = path.read_text(encoding="utf-8")
    before = path.stat()
    path.write_text(text.replace("good 9", "fine 9"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a changed row is seen, whatever the file's time says
    others.append(key_of(path))
    path.write_text(text, encoding="utf-8")
    assert key_of(path) == first
    (tmp_path / "folder").mkdir()
    shutil.copy(path, tmp_path / "folder" / "train.jsonl")
    others.append(key_of(tmp_path / "folder"))
    shutil.copy(path, tmp_path / "folder" / "train2.jsonl")
    others.append(key_of(tmp_path / "folder"))
    assert None not in others
    assert len({first, *others}) == 1 + len(others)


def test_what_says_nothing_of_its_content_is_not_cached(tmp_path: Path) -> None:
    rows = list(made_rows(20))
    assert tokenised(rows, tmp_path / "cache").note is None
    from datasets import Dataset

    data = Dataset.from_list(rows)
    assert "written to" in str(tokenised(data, tmp_path / "cache").note)
    assert "read from" in str(tokenised(Dataset.from_list(rows), tmp_path / "cache").note)
    assert "written to" in str(tokenised(data.select(range(10)), tmp_path / "cache").note)
    assert tokenised(data.to_iterable_dataset(), tmp_path / "cache").note is None


def test_small_sets_touch_no_disk_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    path = write_rows(tmp_path / "rows.jsonl")
    assert tokenised(str(path), Path("auto")).note is None
    assert not (tmp_path / "hf").exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(" " * (5 << 20))  # a blank line is no row
    assert "written to" in str(tokenised(str(path), Path("auto")).note)
    assert cache_folder("auto") == tmp_path / "hf" / "orpo-tokens"
    assert [cache_folder(name) for name in ("none", None)] == [None, None]


@pytest.mark.parametrize("damage", ["cut", "garbage", "no facts"])
def test_a_damaged_set_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    first = shown(tokenised(str(path), tmp_path / "cache").groups)
    (groups,) = (tmp_path / "cache").glob(f"*/{GROUPS_NAME}")
    if damage == "cut":
        groups.write_bytes(groups.read_bytes()[:1000])
    elif damage == "garbage":
        groups.write_bytes(bytes(groups.stat().st_size))
    else:
        (groups.parent / FACTS_NAME).write_text("{", encoding="utf-8")
    assert shown(tokenised(str(path), tmp_path / "cache").groups) == first
    assert "cannot be used" in caplog.text
    assert "read from" in str(tokenised(str(path), tmp_path / "cache").note)


# --- processes -------------------------------------------------------------------------------------------------------------------------


CHILD = (
    "import sys; sys.path[:0] = [{tests!r}]; from data.test_stored import tokenise_slowly; tokenise_slowly({path!r}, {cache!r}, {pause})"
)


def tokenise_slowly(path: str, cache: str, pause: float) -> None:
    """In a process of its own: rows that come slowly, so that others meet it."""

    def slow_rows() -> Iterator[Any]:
        print("at it", flush=True)
        time.sleep(pause)
        yield from stream_preferences(path, pairs=SETTINGS.pairs, sft_rows=SETTINGS.sft_rows)

    print(tokenised(path, Path(cache), open_rows=slow_rows, tell=print).note, flush=True)


def start_child(path: Path, cache: Path, pause: float) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parents[1]), path=str(path), cache=str(cache), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    children = [start_child(path, tmp_path / "cache", 2.0) for _ in range(2)]
    told = [child.communicate(timeout=120)[0] for child in children]
    assert sorted("written to" in text for text in told) == [False, True]
    assert sum("read from" in text for text in told) == 1
    assert sum("at it" in text for text in told) == 1


def test_a_writer_that_is_killed_leaves_nothing_half(tmp_path: Path) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"
    child = start_child(path, cache, 60)
    assert child.stdout is not None
    assert "at it" in child.stdout.readline()
    staged = [item for item in cache.iterdir() if item.is_dir() and item.name.startswith(".")]
    assert len(staged) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not list(cache.glob(f"[0-9a-f]*/{GROUPS_NAME}"))
    assert "written to" in str(tokenised(str(path), cache).note)
    assert not staged[0].exists()


def test_a_full_or_wrong_place_is_told_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    expected = shown(tokenised(str(path), None).groups)
    (tmp_path / "file").write_text("here already", encoding="utf-8")
    assert shown(tokenised(str(path), tmp_path / "file").groups) == expected
    assert "Not a directory" in caplog.text or "File exists" in caplog.text
    assert "token_cache: none" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("free_bytes", [8 << 10, 96 << 10])
def test_a_full_disk_is_told_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture, free_bytes: int) -> None:
    """Before anything is written where it can be foreseen, and in the middle of writing."""
    path = write_rows(tmp_path / "rows.jsonl", 500)
    with small_disk(tmp_path / "disk", "tmpfs", free_bytes) as place:
        found = tokenised(str(path), place / "cache")
        assert isinstance(found.groups, list)
        assert "No space left" in caplog.text
        assert not list((place / "cache").glob(f"[0-9a-f]*/{GROUPS_NAME}"))


def _double(number: int) -> int:
    if number == 13:
        raise ValueError("thirteen")
    if number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


@settings(max_examples=15)
@given(number=st.integers(0, 12), num_processes=st.integers(1, 3))
def test_results_come_in_the_order_of_the_tasks(number: int, num_processes: int) -> None:
    assert list(map_in_processes(_double, range(number), num_processes)) == [2 * task for task in range(number)]


def test_what_goes_wrong_in_a_process_is_told_here() -> None:
    with pytest.raises(ValueError, match="thirteen"):
        list(map_in_processes(_double, [1, 13], 2))
    with pytest.raises(UserError, match=r"(?s)has ended \(exit code -9\).*lower dataset_num_proc"):
        list(map_in_processes(_double, [1, 2, 17, 3], 2))


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "import os, time\n"
        "from orpo.data.stored.workers import map_in_processes\n"
        "results = map_in_processes(lambda task: os.getpid(), iter(int, 1), 3)\n"
        "print(*{next(results) for _ in range(6)}, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end_s = time.monotonic() + 60
    while any(map(_is_running, children)):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_log_of_a_first_start_names_no_cache_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokenised(str(write_rows(tmp_path / "rows.jsonl")), tmp_path / "cache")
    assert "cannot be used" not in caplog.text
