"""The commands of the README and of the first run, typed one after the other as they stand, in a folder with nothing but one's pairs.

What a reader puts in (a run's name) is put in; a tiny model and few steps stand in for the packaged model, whose demo is another test's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "init": "--model model",
    "check": "--quick --use_cpu true",
    "train": "--max_steps 3 --use_cpu true --bf16 false --json",
    "pairs": "--max_new_tokens 100 --num_samples 8",
    "eval": "--tasks pairs",
    "compare": "--methods sft,orpo --learning_rates 1e-3 --max_steps 2 --points 1 --max_eval_rows 8 --use_cpu true --bf16 false",
    "chat": "--port 0",
}
"""Command -> what is added to it to make it small."""
PAGES = {"README.md": "## The command line", "docs/start/first-run.md": "## Your own pairs"}
CHECKS = "def passed(prompt, answer):\n    return len(answer) % 2 == 0\n"


def commands(page: str) -> list[str]:
    """The lines of a section's blocks for a shell."""
    section = (REPOSITORY / page).read_text(encoding="utf-8").partition(PAGES[page])[2].partition("\n## ")[0]
    lines = [
        line.partition("  #")[0]
        for block in re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    return [command.strip() for line in lines for command in line.split("·") if command.strip()]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:12]), encoding="utf-8")
    (tmp_path / "checks.py").write_text(CHECKS, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_does_what_stands_beside_it(page: str, folder: Path) -> None:
    typed = commands(page)
    assert len(typed) > 7
    run = "runs/RUN"
    for line in typed:
        words = re.sub(r"runs/(RUN|orpo-\w+)", run, line).replace("smollm2-135m-instruct", "model").split()[1:]
        command = [sys.executable, "-m", "orpo", *words, *("" if "--prompt" in words else SMALL.get(words[0], "")).split()]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"}
        if words[0] == "chat":
            talk(command, folder, environment, is_page="--web" in words)
            continue
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if words[0] == "train":
            run = json.loads(done.stdout)["folder"]
    assert (folder / run / "report.html").is_file()


def talk(command: list[str], folder: Path, environment: dict[str, str], *, is_page: bool) -> None:
    """A chat prints where its page is, or answers until its input ends."""
    if not is_page:
        command = [word for word in command if word not in ("--port", "0")]
        done = subprocess.run(command, cwd=folder, env=environment, input="Hello\n", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline()  # an end where it never came
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert address.startswith("http://127.0.0.1:"), told
    assert process.returncode == 143, told
