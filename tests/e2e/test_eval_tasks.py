"""Tasks of `orpo eval`: one from outside of the package, and how the models that all of them ask are loaded."""

from __future__ import annotations

import gc
import html
import json
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest

from evalruns import train_tiny
from htmlpages import parse
from orpo.cli import main
from orpo.errors import UserError
from orpo.evaluate import session as session_module
from orpo.evaluate.options import EvalOptions
from orpo.evaluate.suite import Evaluation
from orpo.evaluate.task import Task, TaskOption, register
from orpo.report import write_report

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}

VOWELS = '''
"""How many vowels answers have: a task from outside of the package."""

from pathlib import Path

from orpo.evaluate.bootstrap import estimate_mean
from orpo.evaluate.task import Task, TaskOption, register
from orpo.report.sections import Statement
from orpo.report.shown import AnswerColumns, Drawing, Score, Shown


@register
class Vowels(Task):
    name = "vowels"
    help = "share of 10 % and more of vowels in answers"
    options = (
        TaskOption("vowel_prompts", "file with prompts, one on each line", Path),
        TaskOption("vowel", "a letter; repeatable", is_repeated=True, default=("a", "e", "i", "o", "u")),
        TaskOption("is_loud", "in capitals", bool, default=False),
    )

    def prepare(self, session):
        self.prompts = session.option("vowel_prompts").read_text().splitlines()[: session.options.limit]
        self.texts = {}
        return session.sides

    def measure(self, session, which, subject):
        self.texts[which] = [answer.text for answer in session.answers(self.prompts, session.sampling(5), which)]

    def run(self, session):
        letters = session.option("vowel")
        counts = {
            which: [sum(letter in letters for letter in text) / max(len(text), 1) for text in texts] for which, texts in self.texts.items()
        }
        return {
            "letters": list(letters),
            "is_loud": session.option("is_loud"),
            **{which: estimate_mean(found).to_dict() for which, found in counts.items()},
            "asked": [
                {"prompt": prompt, **{which: texts[row] for which, texts in self.texts.items()}} for row, prompt in enumerate(self.prompts)
            ],
        }

    def lines(self, result):
        yield f"{result['model']['value']:.1%} of the letters are among {''.join(result['letters'])}"

    def show(self, result):
        return Shown(
            "Vowels <b>& more</b>",
            "Vowels",
            lead=["Counted by a plugin."],
            statements=[Statement("Mind the vowels.", "warn")],
            scores=[Score("share of vowels", result["model"], ".1%", is_better=1)],
            figures=[Drawing("Vowels by side", {which: result[which] for which in ("against", "model") if which in result}, style=".0%")],
            answers=AnswerColumns("asked", (("against", "before it"), ("model", "after it"))),
        )
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("tasks"), tiny_model_factory, tiny_tokenizer_factory)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user: a task in one file, and prompts for it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "vowels.py").write_text(VOWELS)
    (folder / "prompts.txt").write_text("Say something\nSay more\nSay it again\n")
    return folder


def test_a_task_from_outside_by_flags(trained, outside, tmp_path, capsys):
    """Its option is a flag, its lines are on the terminal, its result is a file, and the report draws it without knowing it."""
    words = ["--plugins", outside / "vowels.py", "--tasks", "vowels", "--vowel_prompts", outside / "prompts.txt", "--limit", 2]
    capsys.readouterr()
    assert main(["eval", str(trained), *map(str, words), "--vowel", "o", "--vowel", "u", "--is_loud"]) == 0
    shown = capsys.readouterr()
    assert "vowels: " in shown.out
    assert "of the letters are among ou" in shown.out
    assert shown.out.index("warning      Mind the vowels.") < shown.out.index("vowels: ")
    record = json.loads((trained / "eval" / "vowels.json").read_text())
    assert record["result"]["letters"] == ["o", "u"]
    assert record["result"]["is_loud"] is True
    assert len(record["result"]["asked"]) == 2
    assert set(record["models"]) == {"against", "model"}
    # The report is made where the task is not known: from the file alone.
    code = "import sys; from orpo.report import write_report; write_report(sys.argv[1]); print('orpo.evaluate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "False"
    page = (trained / "report.html").read_text(encoding="utf-8")
    main_part = html.unescape(page[page.index("<main>") : page.index("</main>")])
    for said in ("Vowels <b>& more</b>", "Counted by a plugin.", "share of vowels", "Vowels by side", "before it", "Say something"):
        assert said in main_part, said
    assert (
        main_part.index("Mind the vowels.") < main_part.index('id="curves"') < main_part.index('id="task-vowels"')
    )  # a warning goes first
    assert '"task-vowels"' in main_part
    assert "vowels, share of vowels" in (trained / "README.md").read_text(encoding="utf-8")  # the model card
    figures = json.loads(parse(page).scripts[0])
    assert [trace["y"] for trace in figures["vowels-1"]["traces"]] == [["against", "model"]]


def test_a_task_from_outside_by_a_file(trained, outside, tmp_path, capsys):
    config = {
        "target": str(trained),
        "plugins": [str(outside / "vowels.py")],
        "tasks": ["vowels"],
        "vowel_prompts": str(outside / "prompts.txt"),
        "vowel": ["a"],
        "no_before": True,
        "is_loud": False,
        "limit": 3,
        "temperature": None,
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(config))  # JSON is YAML
    capsys.readouterr()
    assert main(["eval", "--config", str(tmp_path / "eval.yaml"), "--json", "--limit", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["vowels"]
    assert (found["result"]["letters"], found["result"]["is_loud"], found["limit"]) == (["a"], False, 1)  # what is given here goes first
    assert set(found["models"]) == {"model"}


def test_a_task_from_outside_from_python(trained, outside, tmp_path):
    given = {"vowel_prompts": outside / "prompts.txt"}
    options = EvalOptions(str(trained), ("vowels",), has_before=False, given=given, plugins=(str(outside / "vowels.py"),), output=tmp_path)
    records, errors = Evaluation(options).run()
    assert errors == {}
    assert records["vowels"]["result"]["letters"] == ["a", "e", "i", "o", "u"]
    with pytest.raises(UserError, match="no task has the option 'vowel_prompt'"):
        Evaluation(EvalOptions(str(trained), ("vowels",), given={"vowel_prompt": 1}))


def test_a_task_of_an_installed_package(tmp_path, trained, outside):
    """Found by its entry point, without a word on the command line; its option is in the help."""
    package = tmp_path / "site"
    (package / "vowel_package-1.dist-info").mkdir(parents=True)
    (package / "vowel_package-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vowel-package\nVersion: 1\n")
    (package / "vowel_package-1.dist-info" / "entry_points.txt").write_text("[orpo.tasks]\nvowels = vowel_package\n")
    (package / "vowel_package.py").write_text(VOWELS)
    code = f"import sys; sys.path.insert(0, {str(package)!r}); from orpo.cli import main; sys.exit(main(['eval', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert "--vowel_prompts" in done.stdout
    assert "share of 10 % and more of vowels" in done.stdout


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("taskz: [pairs]\n", "did you mean tasks?"),
        ("plugins: {a: 1}\n", "modules or files"),
        ("no_before: 3\n", "true or false"),
        ("- pairs\n", "holds no keys"),
        ("tasks: [pairs\n", "is no YAML"),
        ("plugins: [nowhere.py]\n", "eval.yaml: plugins"),
        ("tasks: [pears]\n", "did you mean pairs?"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(trained, tmp_path, capsys, content, told):
    (tmp_path / "eval.yaml").write_text(content)
    capsys.readouterr()
    assert main(["eval", str(trained), "--config", str(tmp_path / "eval.yaml")]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert "Traceback" not in shown.err


def _task(name: str, *options: str) -> type[Task]:
    return type(f"Made{name.title()}", (Task,), {"name": name, "options": tuple(TaskOption(option, "an option") for option in options)})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("pairs", (), "there is a task 'pairs' already"),
        ("Report", (), "it names a file"),
        ("demo", (), "it names a file"),
        ("../x", (), "it names a file"),
        ("mine", ("data",), "is one of the task pairs"),
        ("mine", ("a b",), "no name for an option"),
    ],
)
def test_a_task_that_collides_is_refused(name, options, told):
    with pytest.raises(UserError, match="the task") as refused:
        register(_task(name, *options))
    assert told in str(refused.value)


def test_an_option_of_the_command_itself_is_no_tasks(tmp_path, capsys):
    """Said by whoever declares it, in a process of its own: a task stays registered."""
    (tmp_path / "bad.py").write_text(
        textwrap.dedent("""
        from orpo.evaluate.task import Task, TaskOption, register

        @register
        class Bad(Task):
            name = "bad"
            options = (TaskOption("limit", "mine"),)
        """)
    )
    command = [sys.executable, "-m", "orpo", "eval", "x", "--plugins", str(tmp_path / "bad.py"), "--tasks", "bad"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "its option 'limit' is one of `orpo eval` itself" in done.stderr
    assert "bad_limit" in done.stderr


class _Loads:
    """Loading as ever, watched: what is loaded, and what is alive at that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.alive: list[int] = []
        self._models: list[Any] = []
        self._load = session_module.load_subject
        monkeypatch.setattr(session_module, "load_subject", self.load)

    def load(self, name: str, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        self.names.append(name)
        self.alive.append(sum(model() is not None for model in self._models))
        subject = self._load(name, *args, **kwargs)
        self._models.append(weakref.ref(subject.model))
        return subject


def test_each_model_is_loaded_once_and_gone_before_the_next(trained, outside, tmp_path, capsys, monkeypatch):
    loads = _Loads(monkeypatch)
    words = ["--tasks", "pairs,retention,vowels", "--plugins", outside / "vowels.py", "--vowel_prompts", outside / "prompts.txt"]
    words += ["--limit", 4, "--max_new_tokens", 3, "--output", tmp_path / "out"]
    capsys.readouterr()
    assert main(["eval", str(trained), *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    base = str(trained.parent / "base")
    assert loads.names == [base, str(trained)]
    assert loads.alive == [0, 0]
    for record in found["tasks"].values():
        assert {which: one["name"] for which, one in record["models"].items()} == {"against": base, "model": str(trained)}
    assert found["tasks"]["pairs"]["result"]["shown"]


def test_a_task_that_fails_holds_no_model(trained, tmp_path, capsys, monkeypatch):
    """Its error goes on living until the end; the model that was being asked does not."""
    loads = _Loads(monkeypatch)
    (tmp_path / "breaking.py").write_text(
        textwrap.dedent("""
        from orpo.errors import UserError
        from orpo.evaluate.task import Task, register

        @register
        class Breaking(Task):
            name = "breaking"

            def prepare(self, session):
                return session.sides

            def measure(self, session, which, subject):
                try:
                    raise ValueError("deep inside")
                except ValueError as error:
                    raise UserError("it broke", where="breaking") from error
        """)
    )
    words = ["--tasks", "breaking,retention", "--plugins", tmp_path / "breaking.py", "--limit", 2, "--max_new_tokens", 3]
    capsys.readouterr()
    assert main(["eval", str(trained), *map(str, words), "--output", str(tmp_path / "out")]) == 2
    assert "it broke" in capsys.readouterr().err
    assert loads.alive == [0, 0]
    assert (tmp_path / "out" / "retention.json").is_file()


def test_a_result_names_the_models_that_it_is_of_and_no_others(trained, tmp_path, capsys):
    """Given answers of both sides: no model is loaded for them, though another task of the same command loads two."""
    from judgeserver import Say, judge_server

    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n{"prompt": "Good day"}\n')
    answers.write_text('{"prompt": "Hello", "response": "Hi."}\n{"prompt": "Good day", "response": "And to you."}\n')
    words = ["--tasks", "retention,custom", "--prompts", prompts, "--against_answers", answers, "--limit", 2, "--max_new_tokens", 3]
    with judge_server(lambda number, body: Say("[[A]]")) as server:
        capsys.readouterr()
        judged = ["--judge_url", server.url, "--judge_model", "m"]
        assert main(["eval", str(trained), *map(str, words), *judged, "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert set(found["retention"]["models"]) == {"against", "model"}
    assert set(found["custom"]["models"]) == {"model"}


def test_a_report_beside_another_draws_a_strange_task_once(trained, outside, tmp_path, capsys):
    words = ["--plugins", outside / "vowels.py", "--tasks", "vowels", "--vowel_prompts", outside / "prompts.txt", "--no_before"]
    assert main(["eval", str(trained), *map(str, words)]) == 0
    assert main(["eval", str(trained.parent / "base"), *map(str, words), "--output", str(tmp_path / "other")]) == 0
    report = write_report(trained, output=tmp_path / "page.html", beside=[tmp_path / "other"])
    figures = json.loads(parse(report.page.read_text(encoding="utf-8")).scripts[0])
    assert [trace["name"] for trace in figures["vowels-1"]["traces"]] == ["run", "other"]
