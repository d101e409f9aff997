"""IFEval: our scores against lm-eval's own run of the same answers."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from orpo.errors import DataError, UserError
from orpo.evaluate.tasks import ifeval

METRICS = {
    "prompt_strict": "prompt_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_strict": "inst_level_strict_acc",
    "instruction_loose": "inst_level_loose_acc",
}


# Their counts of "#" and "!" are checked for a random letter instead, so that lm-eval itself gives another score every time.
DRAWN_BY_LM_EVAL = (1122, 1129)


@pytest.fixture(scope="module")
def checkers():
    """lm-eval's checkers, with NLTK's data; skips where the extra or the data is not here."""
    try:
        return ifeval.load_checkers()
    except UserError as error:
        pytest.skip(str(error))


def fixed_answers(items: list[ifeval.Item]) -> list[str]:
    """An answer to every prompt, of many kinds, always the same."""
    generator = random.Random(7)
    words = ["the", "river", "was", "calm", "and", "nobody", "spoke", "about", "it", "again", "until", "winter", "came"]
    answers = []
    for number, item in enumerate(items):
        sentences = [" ".join(generator.choices(words, k=generator.randint(4, 12))).capitalize() + "." for _ in range(1 + number % 9)]
        body = " ".join(sentences)
        kinds = [
            body,
            body.upper(),
            body.lower(),
            f"<<{body}>>\n\n* one\n* two\n* three\n\nP.S. done",
            f'"{body}"',
            f"{item.prompt}\n\n{body}",
            json.dumps({"answer": body}),
            "\n\n***\n\n".join(sentences),
            f"My answer is yes.\n*{words[0]} {words[1]}* and *{words[2]}* [name] [place]\n{body}",
            "Der Fluss war ruhig und niemand sprach darüber, bis der Winter kam.",
            "",
        ]
        answers.append(kinds[number % len(kinds)])
    return answers


def test_scores_equal_lm_evals_functions(checkers, shared_data):
    """All 541 prompts through lm-eval's own scoring and aggregation."""
    items = ifeval.read_items(shared_data / "ifeval" / "input_data.jsonl")
    assert len(items) == 541
    answers = fixed_answers(items)
    found = ifeval.check_answers(items, answers)
    import langdetect

    langdetect.DetectorFactory.seed = ifeval.DRAW_SEED
    rows = [json.loads(line) for line in (shared_data / "ifeval" / "input_data.jsonl").read_bytes().split(b"\n") if line]
    results = []
    for row, answer in zip(rows, answers, strict=True):
        random.seed(ifeval.DRAW_SEED)
        results.append(checkers.process_results(row, [answer]))
    for ours, theirs in METRICS.items():
        values = [result[theirs] for result in results]
        expected = checkers.agg_inst_level_acc(values) if theirs.startswith("inst") else sum(values) / len(values)
        assert getattr(found, ours).value == pytest.approx(expected, abs=1e-12)
    assert 0.02 < found.prompt_strict.value < found.instruction_loose.value < 0.9
    assert found.num_instructions == 834
    assert sum(count for count, _ in found.by_kind.values()) == 834
    assert found.prompt_strict.low < found.prompt_strict.value < found.prompt_strict.high


def test_scores_equal_a_whole_run_of_lm_eval(checkers, shared_data, tmp_path):
    """lm-eval's own evaluator, task definition and metrics, over a model that says the fixed answers."""
    import langdetect
    import lm_eval
    import yaml
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    source = shared_data / "ifeval" / "input_data.jsonl"
    items = [item for item in ifeval.read_items(source) if item.key not in DRAWN_BY_LM_EVAL]
    answers = dict(zip((item.prompt for item in items), fixed_answers(items), strict=True))

    class Parrot(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    rows = [json.loads(line) for line in source.read_bytes().split(b"\n") if line]
    rows = [row for row in rows if row["key"] not in DRAWN_BY_LM_EVAL]
    names = sorted({name for row in rows for given in row["kwargs"] for name in given})
    for row in rows:  # one schema for all rows, as on the hub
        row["kwargs"] = [{name: given.get(name) for name in names} for given in row["kwargs"]]
    data = tmp_path / "ifeval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    original = Path(checkers.__file__).parent / "ifeval.yaml"
    plain = original.read_text().replace("!function utils.", "function utils.")
    task = yaml.safe_load(plain)
    task |= {"task": "ifeval_here", "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(data)}}}
    task.pop("dataset_name", None)
    text = yaml.safe_dump(task).replace("function utils.", "!function utils.")
    (tmp_path / "ifeval_here.yaml").write_text(text)
    for name in ("utils.py", "instructions.py", "instructions_registry.py", "instructions_util.py"):
        (tmp_path / name).write_text((original.parent / name).read_text())
    langdetect.DetectorFactory.seed = ifeval.DRAW_SEED
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    run = lm_eval.simple_evaluate(model=Parrot(), tasks=["ifeval_here"], task_manager=manager, bootstrap_iters=0, cache_requests=False)
    theirs = run["results"]["ifeval_here"]
    ours = ifeval.check_answers(items, fixed_answers(items))
    for name, metric in METRICS.items():
        assert getattr(ours, name).value == pytest.approx(theirs[f"{metric},none"], abs=1e-12)


def test_sentences_are_counted_offline(checkers):
    """The check that needs NLTK's data."""
    item = ifeval.Item(1, "Write.", ("length_constraints:number_sentences",), ({"relation": "at least", "num_sentences": 3},))
    found = ifeval.check_answers([item, item], ["One. Two, e.g. this one. Three!", "One sentence."])
    assert found.followed == (((True, True),), ((False, False),))


def test_loose_forgives_a_first_line(checkers):
    item = ifeval.Item(1, "Write in lower case.", ("change_case:english_lowercase",), ({},))
    found = ifeval.check_answers([item], ["Sure, HERE it is:\n\nall of this is written in lower case, every word of it."])
    assert (found.prompt_strict.value, found.prompt_loose.value) == (0.0, 1.0)


def test_scores_do_not_depend_on_random_numbers_or_move_them(checkers, shared_data):
    items = ifeval.read_items(shared_data / "ifeval" / "input_data.jsonl", limit=60)
    answers = fixed_answers(items)
    random.seed(1)
    first = ifeval.check_answers(items, answers)
    state = random.getstate()
    random.seed(2)
    assert ifeval.check_answers(items, answers) == first
    random.seed(1)
    assert random.getstate() == state


def test_prompts_of_another_kind_are_refused(tmp_path, checkers):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="not a row of IFEval"):
        ifeval.read_items(path)
    with pytest.raises(UserError, match="no checker for made:up"):
        ifeval.check_answers([ifeval.Item(1, "x", ("made:up",), ({},))], ["y"])


def test_arguments_that_are_null_are_none(tmp_path):
    """The hub's rows carry every argument's name, mostly with null."""
    path = tmp_path / "prompts.jsonl"
    row = {"key": 1, "prompt": "x", "instruction_id_list": ["a:b", "c:d"], "kwargs": [{"num_words": None, "relation": "at least"}, None]}
    path.write_text(json.dumps(row) + "\n")
    assert ifeval.read_items(path)[0].arguments == ({"relation": "at least"}, {})


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"pip install .*\[ifeval\]"):
        ifeval.load_checkers()


def test_missing_data_is_named_before_anything_is_generated(monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk", reason="the extra ifeval is not installed")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(ifeval, "_PUNKT_WHEEL", "no-such-distribution")
    with pytest.raises(UserError, match="punkt_tab"):
        ifeval._provide_punkt(nltk)


def test_the_wheels_data_is_copied_into_our_cache(monkeypatch, tmp_path):
    """NLTK refuses hard links, which installers make."""
    nltk = pytest.importorskip("nltk", reason="the extra ifeval is not installed")
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        wheel = distribution(ifeval._PUNKT_WHEEL)
    except PackageNotFoundError:
        pytest.skip("no wheel with NLTK's data is installed: pip install --no-deps llama-index-core")
    assert Path(str(wheel.locate_file(ifeval._PUNKT_FOLDER))).is_dir()
    monkeypatch.setenv("ORPO_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    ifeval._provide_punkt(nltk)
    assert nltk.data.path == [str(tmp_path / "nltk_data")]
    assert sorted(path.name for path in (tmp_path / "nltk_data" / ifeval._PUNKT).iterdir())
