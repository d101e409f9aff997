"""What documents tell people to type: commands parse, with options and keys that exist; blocks of Python are run, or say why not.

A block is excused by a comment in front of it, `<!-- not run: why -->`; a page whose blocks another test runs says so at its top,
`<!-- python run by: tests/docs/FILE -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from orpo.cli import build_parser, command_modules, parse
from orpo.config.shipped import packaged_path
from orpo.run.keys import key_types
from orpo.run.read import read_flags

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if page.is_file() and "_build" not in page.parts]
BLOCK = re.compile(r"(?:^<!-- (?P<why>not run: [^>]+?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
TABLE_PAGES = [REPOSITORY / "docs" / "guides" / name for name in ("from-axolotl.md", "from-llama-factory.md")]


ALL_LANGUAGES = sorted({match["language"] for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))})


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `why` it is not run, or None."""

    page: Path
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] in languages:
                yield Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["text"], match["why"])


def typed_lines() -> Iterator[tuple[str, str]]:
    """(where, line) of every command in a block for a shell."""
    for block in blocks("sh", "bash"):
        if block.why:
            continue
        for number, line in enumerate(block.text.splitlines(), start=1):
            typed = line.partition("  #")[0].strip().removeprefix("$ ").removeprefix(".venv/bin/")
            for part in typed.split("·"):
                if part.strip() and not part.startswith("#"):
                    # What a launcher starts is a command of ours; the launcher's own words are its business.
                    yield f"{block}+{number}", re.sub(r"^(torchrun|srun|accelerate launch) .*?\borpo ", "orpo ", part.strip())


LINES = list(typed_lines())


def test_there_are_some() -> None:
    assert len([line for _, line in LINES if line.startswith("orpo ")]) > 40


@pytest.mark.parametrize(("where", "line"), [item for item in LINES if item[1].startswith("orpo ")], ids=lambda text: text[:60])
def test_commands_parse_and_their_keys_exist(where: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in shlex.split(line.partition(" > ")[0])[1:] if word != "…"]
    try:
        args = parse(words)
    except SystemExit:
        pytest.fail(f"{where}: {line}\n{capsys.readouterr().err}")
    if getattr(command_modules()[words[0]], "TAKES_KEYS", False):
        problems: list = []
        _, rest = read_flags(args.keys, problems)
        assert not problems, f"{where}: {[str(problem) for problem in problems]}"
        assert all(word.endswith((".yaml", ".yml")) for word in rest), f"{where}: {rest}"
    for word in words:
        if word.startswith("recipes/"):
            assert packaged_path(Path(word)).is_file() or (REPOSITORY / word).is_file(), f"{where}: there is no {word}"


@pytest.mark.parametrize(("where", "line"), [item for item in LINES if not item[1].startswith("orpo ")], ids=lambda text: text[:60])
def test_other_commands_are_known(where: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        if shutil.which("make"):
            done = subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{where}: {done.stderr}"
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (REPOSITORY / words[1]).is_file(), where
    else:
        # Installing changes the machine; the wheel's own test installs.
        assert words[0] in ("pip", "git", "cd") or words[1:3] == ["-m", "venv"], f"{where}: say `<!-- not run: why -->` above it: {line}"


def spoken_of() -> Iterator[tuple[str, str]]:
    """(where, command) of every command inside a sentence, of pages and of notebooks; words in capitals are the reader's."""
    texts = [(page, re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)) for page in PAGES]
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts.append((path, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")))
    for page, text in texts:
        for match in re.finditer(r"`(orpo [^`]+)`", text):
            yield page.name, " ".join(match[1].split())


@pytest.mark.parametrize(("where", "line"), sorted(set(spoken_of())), ids=lambda text: text[:60])
def test_commands_in_sentences_have_their_options(where: str, line: str) -> None:
    """Half a command is enough to be understood, but its name and its flags are there."""
    words = shlex.split(line)[1:]
    if not words[0].startswith("-"):
        modules = command_modules()
        assert words[0] in modules, f"{where}: {line}"
        known = options_of(words[0]) | ({f"--{key}" for key in key_types()} if getattr(modules[words[0]], "TAKES_KEYS", False) else set())
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert set(flags) <= known, f"{where}: {line}"


def options_of(command: str) -> set[str]:
    """The flags of a command's parser."""
    (commands,) = (action for action in build_parser(command_modules())._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for action in commands.choices[command]._actions for flag in action.option_strings}


@pytest.mark.parametrize("block", [*blocks("yaml", "json", "toml")], ids=str)
def test_files_that_are_shown_can_be_read(block: Block) -> None:
    """A configuration has keys that exist, those of the objective on its page among them."""
    if block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    else:
        made = re.findall(r"@register\(\"(\w+)\"", block.page.read_text(encoding="utf-8"))
        unknown = set(yaml.safe_load(block.text)) - set(key_types())
        assert all(key.startswith(tuple(f"{name}_" for name in made)) for key in unknown), f"{block}: {unknown}"


def test_every_block_is_of_a_kind_that_is_looked_at() -> None:
    """Text is what a reader sees; everything else is typed, run, read, or said why not."""
    looked_at = {"sh", "bash", "python", "yaml", "json", "toml", "text", "diff"}
    assert {block.language for block in blocks(*ALL_LANGUAGES)} <= looked_at


def python_blocks() -> Iterator[Block]:
    for block in blocks("python"):
        head = block.page.read_text(encoding="utf-8")[:400]
        tester = re.search(r"<!-- python run by: (\S+) -->", head)
        if tester is None:
            yield block
        else:
            assert block.page.name in (REPOSITORY / tester[1]).read_text(encoding="utf-8"), f"{tester[1]} does not read {block.page.name}"


@pytest.mark.parametrize("block", [block for block in python_blocks() if block.why], ids=str)
def test_python_that_is_not_run_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")
    assert len(block.why or "") > len("not run: ") + 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", [block for block in python_blocks() if not block.why], ids=str)
def test_python_runs(block: Block, smollm2_folder: Path, tmp_path: Path) -> None:
    """As it stands, in a folder with a file of pairs; the bundled model is found by its name."""
    rows = [f'{{"prompt": "Question {n}?", "chosen": "A good answer to {n}.", "rejected": "No. {n}!"}}\n' for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "block.py").write_text(block.text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", TABLE_PAGES, ids=lambda page: page.stem)
def test_tables_of_other_tools_name_keys_that_exist(page: Path) -> None:
    rows = re.findall(r"^\| `.*?\| (.*?) \|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for cell in rows:
        for code in re.findall(r"`([a-z_0-9]+)(?:: [^`]*)?`", cell):
            assert code in key_types(), f"{page.name}: {code}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "changelog.md"], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page.name}: {target}"
