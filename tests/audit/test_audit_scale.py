"""Size: 100,000 rows of 300 words in under three minutes, and memory that does not grow with the length of the rows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NUM_ROWS = 100_000
_AUDIT = """
import json, resource, sys
from orpo.data.audit import AuditOptions, run_audit
if __name__ == "__main__":
    audit = run_audit(sys.argv[1], AuditOptions(num_workers=2))
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    kib = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]  # of the largest worker
    found = {finding.code: finding.num_rows for finding in audit.findings}
    print(json.dumps({"rows": audit.num_rows, "seconds": audit.seconds, "mib": [k / 1024 for k in kib], "found": found}))
"""


def write_rows(path: Path, num_rows: int, words_per_text: int) -> None:
    """Rows of three texts of random words, commoner and rarer ones, with a hundred exact copies and a hundred near ones."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(30_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    pool = rng.choices(vocabulary, weights, k=2_000_000)

    def text() -> str:
        start = rng.randrange(len(pool) - words_per_text)
        some = pool[start : start + words_per_text]
        some[rng.randrange(words_per_text)] = str(rng.random())
        rng.shuffle(some)
        return " ".join(some) + "."

    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            row = {"prompt": text(), "chosen": text(), "rejected": text()}
            lines = [row]
            if number % (num_rows // 100) == 0:
                lines += [row, {key: value + " indeed" for key, value in row.items()}]
            for line in lines:
                file.write(json.dumps(line) + "\n")


def audit(tmp_path: Path, path: Path) -> dict[str, Any]:
    script = tmp_path / "audit.py"
    script.write_text(_AUDIT, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_rows_take_less_than_three_minutes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, NUM_ROWS, 100)
    facts = audit(tmp_path, path)
    print(facts)
    assert facts["rows"] == NUM_ROWS + 200
    assert facts["found"]["duplicates"] == 100
    assert facts["found"]["near_duplicates"] >= 95  # the locality-sensitive hashing may miss one in twenty
    assert facts["seconds"] < 180
    assert max(facts["mib"]) < 900


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_length_of_the_rows(tmp_path: Path) -> None:
    peaks = []
    for words in (30, 600):
        path = tmp_path / f"{words}.jsonl"
        write_rows(path, 8_000, words)
        peaks.append(max(audit(tmp_path, path)["mib"]))
        path.unlink()
    assert peaks[1] < peaks[0] + 60  # the second file has 80 MB more
