"""The facts of a run on disk: `run.json` (what it is) and `metrics.jsonl` (what happened), free of secrets.

    run = RunFolder("runs/first")
    run.write(configuration=as_facts(config), versions=versions(), ...)     # one atomic replacement
    trainer.add_callback(MetricsCallback(run.metrics))                      # orpo.training.metrics

`metrics.jsonl` is append-only, one object per log, and the truth that every report reads. A checkpoint stores its length in bytes
(`MetricsLog.num_bytes`), and a resumed run cuts the file back to it (`truncate_to`), so that no step is there twice or missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orpo.errors import CheckpointError, UserError
from orpo.system.files import flags, write_atomically
from orpo.system.redact import redact

FORMAT = 1
"""Of run.json; raised when a reader of older files would misread a new one."""


RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"


class RunFolder:
    """A run's folder. Creating the object touches nothing; the first write makes the folder.

    Attributes:
        path: the folder.
        metrics: its `metrics.jsonl`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    @property
    def run_json(self) -> Path:
        """The file with the run's facts."""
        return self.path / "run.json"

    def read(self) -> dict[str, Any] | None:
        """The facts, or None where there is no run yet.

        Raises:
            UserError: the file is there and is not what this program writes.
        """
        try:
            facts = json.loads(self.run_json.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot be read: {error}", where=str(self.run_json), mend="remove the file, or use another output_dir"
            ) from error
        if not isinstance(facts, dict) or not isinstance(facts.get("format"), int) or facts["format"] > FORMAT:
            raise UserError(
                "is not a run's facts as this version writes them",
                where=str(self.run_json),
                expected=f"an object with format {FORMAT}",
                mend="use the version of orpo that wrote it, or another output_dir",
            )
        return facts

    def template_date(self) -> str | None:
        """The date that the run's chat template printed at the first start, as ISO 8601; None where it printed none, or nothing has run."""
        template = ((self.read() or {}).get("data") or {}).get("template") or {}
        date = template.get("date")
        return date if isinstance(date, str) else None

    def write(self, **facts: Any) -> None:
        """Replace run.json by what it holds and these facts; a reader sees the old file or the new one, never half of it."""
        merged = {"format": FORMAT, **(self.read() or {}), **facts}
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.run_json, (json.dumps(redact(_finite(merged)), indent=2, ensure_ascii=False) + "\n").encode())

    @property
    def status(self) -> str | None:
        """`running`, `complete`, `stopped` (signal or guard), `failed`, or None for no run."""
        facts = self.read()
        return None if facts is None else str(facts.get("status", RUNNING))


def final_weights(folder: Path) -> Path | None:
    """`model/` or `adapter/` of a run, whichever is there."""
    return next((folder / name for name in ("model", "adapter") if (folder / name).is_dir()), None)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the texts "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    item = getattr(value, "item", None)
    return _finite(item()) if callable(item) and getattr(value, "size", 1) == 1 else str(getattr(value, "value", value))


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, appended whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def num_bytes(self) -> int:
        """Length of the file; 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, record: dict[str, Any]) -> None:
        """Write one record, in one call unless the disk is full, so that a killed process leaves at most one broken line, the last."""
        line = json.dumps(redact(_finite(record)), ensure_ascii=False, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, flags("O_WRONLY", "O_CREAT", "O_APPEND"), 0o644)
        try:
            data = line.encode()
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint records the length."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                os.fsync(file.fileno())

    def truncate_to(self, num_bytes: int) -> None:
        """Cut back to the length at a checkpoint.

        Raises:
            CheckpointError: the file is shorter than that, or no line ends there: it is not the file of this checkpoint.
        """
        length = self.num_bytes
        if num_bytes > length:
            raise CheckpointError(
                f"holds {length} bytes, the checkpoint was made at {num_bytes}",
                where=str(self.path),
                mend="put the run's metrics.jsonl back, or start anew in another output_dir",
            )
        if num_bytes == length:
            return
        with self.path.open("r+b") as file:
            if num_bytes:
                file.seek(num_bytes - 1)
                if file.read(1) != b"\n":
                    raise CheckpointError(f"no line ends at byte {num_bytes}", where=str(self.path), mend="use another output_dir")
            file.truncate(num_bytes)
            os.fsync(file.fileno())

    def drop_after(self, num_bytes: int, is_dropped: Callable[[dict[str, Any]], bool]) -> None:
        """Take records out of what comes after a length; `is_dropped` is asked for each."""
        if num_bytes > self.num_bytes:
            return
        with self.path.open("rb") as file:
            file.seek(num_bytes)
            lines = [line for line in file if line.endswith(b"\n")]
        kept = [line for line in lines if not is_dropped(json.loads(line))]
        if len(kept) < len(lines):
            self.truncate_to(num_bytes)
            with self.path.open("ab") as file:
                file.writelines(kept)

    def read(self) -> Iterator[dict[str, Any]]:
        """The records in order. A last line without its end, left by a kill, is passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
