"""`orpo eval` on a tiny trained run: every task, what is kept, what goes on after a break, and what is said when something is missing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from evalruns import train_tiny
from judgeserver import Break, Say, judge_server
from orpo.cli import build_parser, command_modules, main
from orpo.cli import eval as eval_command
from orpo.evaluate.judging.endpoint import EndpointJudge

SOURCE = Path(__file__).parents[2] / "src"
QUICK = ["--judge_retries", "1", "--judge_workers", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory, tiny_tokenizer_factory) -> Path:
    """A finished run of a few steps, with a quarter of its prompts held out."""
    return train_tiny(tmp_path_factory.mktemp("eval"), tiny_model_factory, tiny_tokenizer_factory)


@pytest.fixture(autouse=True)
def _fresh_results(request: pytest.FixtureRequest) -> None:
    """Every test finds the run without results of another one."""
    if "trained" in request.fixturenames:
        import shutil

        shutil.rmtree(request.getfixturevalue("trained") / "eval", ignore_errors=True)


def evaluate(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """Run the command with --json and give what it prints."""
    capsys.readouterr()
    code = main(["eval", *map(str, words), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


def test_pairs_and_retention_by_default(trained, capsys):
    found = evaluate(capsys, trained, "--slice", "topic", "--slice", "length_difference", "--dtype", "float32", "--max_new_tokens", "4")
    assert found["folder"] == str(trained / "eval")
    pairs = found["tasks"]["pairs"]["result"]
    held_out = json.loads((trained / "run.json").read_text())["data"]["num_held_out"]
    assert pairs["model"]["num_pairs"] == pairs["against"]["num_pairs"] == held_out
    for name in ("accuracy", "margin", "chosen_logp", "rejected_logp"):
        assert pairs["change"][name]["value"] == pytest.approx(pairs["model"][name]["value"] - pairs["against"][name]["value"], abs=1e-6)
    assert sum(part["num_pairs"] for part in pairs["slices"]["topic"].values()) == held_out
    assert set(pairs["slices"]["topic"]) <= {"a", "b", "c"}
    shown = pairs["shown"][0]
    assert "".join(shown["model"]["chosen"]["tokens"]).startswith("A good answer")
    assert shown["model"]["chosen"]["tokens"] == shown["against"]["chosen"]["tokens"]
    assert len(shown["model"]["chosen"]["logps"]) == len(shown["model"]["chosen"]["tokens"])
    retention = found["tasks"]["retention"]["result"]
    assert retention["change"]["nll"]["value"] == pytest.approx(
        retention["model"]["nll"]["value"] - retention["against"]["nll"]["value"], abs=1e-6
    )
    assert retention["model"]["answers"]["num_answers"] == 24
    assert len(retention["shown"]) == 24
    assert json.loads((trained / "eval" / "pairs.json").read_text())["result"] == pairs


def test_the_metrics_are_those_of_the_trainer(trained, capsys):
    """The run's own final evaluation of the same rows."""
    expected = json.loads((trained / "run.json").read_text())["final_metrics"]
    found = evaluate(capsys, trained, "--tasks", "pairs", "--dtype", "float32")["tasks"]["pairs"]["result"]["model"]
    assert found["accuracy"]["value"] == pytest.approx(expected["eval_rewards/accuracies"], abs=1e-6)
    assert found["chosen_logp"]["value"] == pytest.approx(expected["eval_logps/chosen"], abs=1e-4)
    assert found["rejected_logp"]["value"] == pytest.approx(expected["eval_logps/rejected"], abs=1e-4)
    assert found["log_odds_ratio"]["value"] == pytest.approx(expected["eval_log_odds_chosen"], abs=1e-4)


def test_options_of_tasks_that_are_not_asked_for_are_told(trained, tmp_path, capsys):
    words = ["eval", str(trained), "--tasks", "pairs", "--prompts", write_prompts(tmp_path), "--slices", "topic"]
    words += ["--judge_url", "http://127.0.0.1:1/v1", "--judge_workers", "2", "--retry_malformed", "--top_p", "0.5"]
    assert main([*map(str, words)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note ")]
    assert told == [
        "note         --prompts has no effect: the task custom is not among --tasks",
        "note         --top_p has no effect: no answers are made for pairs",
        "note         --judge_url, --judge_workers, --retry_malformed have no effect: no judge is asked for pairs, as one is for mtbench, "
        "alpacaeval, custom",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "pairs,retention", "--top_p", "0.5", "--temperature", "1"], []),
        (["--tasks", "ifeval", "--judge", "m", "--judge_retries", "5"], ["--judge has no effect: no judge is asked for ifeval"]),
        (["--tasks", "custom", "--judge_url", "u", "--judge_model", "m", "--judge_timeout", "9", "--retry_malformed"], []),
        (["--tasks", "custom", "--judge", "m", "--judge_timeout", "9"], ["--judge_timeout has no effect: the judge is a model"]),
        (["--tasks", "custom", "--judge_url", "u", "--judge_logprobs"], ["--judge_logprobs has no effect: the task alpacaeval"]),
        (["--tasks", "alpacaeval", "--judge_url", "u", "--judge_logprobs"], []),
        (["--tasks", "alpacaeval", "--answers", "f", "--max_new_tokens", "4"], ["--max_new_tokens has no effect: the answers are given"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_options_of_judges_and_sampling_that_nothing_reads_are_told(words: list[str], told: list[str]) -> None:
    args = build_parser(command_modules()).parse_args(["eval", "m", *words])
    found = eval_command._idle(args, args.tasks.split(","))
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_a_second_run_computes_nothing(trained, capsys, monkeypatch):
    words = (trained, "--max_new_tokens", "4", "--limit", "6")
    first = evaluate(capsys, *words)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("orpo.evaluate.logprobs.score_tokens", forbidden)
    monkeypatch.setattr("orpo.evaluate.answers.generate", forbidden)
    again = evaluate(capsys, *words)
    for task in ("pairs", "retention"):
        assert again["tasks"][task]["result"] == first["tasks"][task]["result"]
    capsys.readouterr()
    assert main(["eval", str(trained), "--max_new_tokens", "5", "--limit", "6"]) == 1  # other answers are asked for
    assert "computed again" in capsys.readouterr().err


def test_other_rows_and_another_model(trained, tmp_path, capsys):
    rows = [{"prompt": "Say yes", "chosen": "Yes, of course.", "rejected": "The answer is no."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    base = trained.parent / "base"
    found = evaluate(
        capsys, base, "--tasks", "pairs", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--against", trained
    )
    result = found["tasks"]["pairs"]["result"]
    assert result["model"]["num_pairs"] == result["change"]["num_pairs"] == 1
    assert result["model"]["accuracy"]["low"] is None  # one prompt has no interval
    assert (tmp_path / "out" / "pairs.json").is_file()


def test_a_model_inside_a_run_is_that_runs(trained, capsys):
    found = evaluate(capsys, trained / "model", "--tasks", "pairs")
    assert found["folder"] == str(trained / "eval")
    assert found["tasks"]["pairs"]["result"] == evaluate(capsys, trained, "--tasks", "pairs")["tasks"]["pairs"]["result"]


def test_other_models_have_a_folder_of_their_own(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, rows = trained.parent / "base", trained.parent / "rows.jsonl"
    found = evaluate(capsys, base, "--tasks", "pairs", "--data", rows, "--limit", 3)
    assert Path(found["folder"]).parent == Path("eval")
    assert "against" not in found["tasks"]["pairs"]["result"]
    alone = evaluate(capsys, trained, "--tasks", "pairs", "--no_before")["tasks"]["pairs"]["result"]
    assert "change" not in alone


def test_the_demo_data_goes_by_its_name(trained, capsys):
    found = evaluate(capsys, trained, "--tasks", "pairs", "--data", "orpo-demo", "--slice", "scenario", "--limit", 30)
    result = found["tasks"]["pairs"]["result"]
    assert result["model"]["num_pairs"] == 30
    assert "delivery" in result["slices"]["scenario"]


def write_prompts(tmp_path: Path, count: int = 6) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Tell me about {n}"}) + "\n" for n in range(count)))
    return path


def test_a_judge_that_dies_half_way_loses_nothing(trained, tmp_path, capsys):
    """Generation and verdicts of the broken run count in the next one, and its outcome is that of an undisturbed one."""
    words = [trained, "--tasks", "custom", "--prompts", write_prompts(tmp_path), "--max_new_tokens", 6, "--judge_model", "m", *QUICK]

    def verdict(number: int, body: dict) -> Say:
        return Say("[[A]]" if len(body["messages"][1]["content"]) % 3 else "no verdict")

    with judge_server(lambda number, body: verdict(number, body) if number < 5 else Break()) as server:
        assert main(["eval", *map(str, words), "--judge_url", server.url]) == 2
        assert "run the same command again" in capsys.readouterr().err
    assert not (trained / "eval" / "custom.json").exists()
    with judge_server(verdict) as server:
        found = evaluate(capsys, *words, "--judge_url", server.url)["tasks"]["custom"]["result"]
        num_asked = len(server.requests)
    with judge_server(verdict) as server:
        undisturbed = evaluate(capsys, *words, "--judge_url", server.url, "--output", tmp_path / "other")["tasks"]["custom"]["result"]
        num_questions = len(server.requests)
    assert num_asked == num_questions - 5
    assert found == undisturbed
    assert found["num_malformed"] + 2 * found["num_judged"] >= 6
    assert len(found["shown"]) == 6


def test_a_killed_run_goes_on_where_it_was(trained, tmp_path, capsys):
    """SIGKILL in the middle of judging: the answers and the verdicts so far are there."""
    words = ["--tasks", "custom", "--prompts", str(write_prompts(tmp_path, 8)), "--max_new_tokens", "6", "--judge_model", "m", *QUICK]
    with judge_server(lambda number, body: Say("[[B]]", delay_s=0.0 if number < 6 else 60.0)) as server:
        command = [sys.executable, "-m", "orpo", "eval", str(trained), *words, "--judge_url", server.url]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 120
        while len(server.requests) < 7 and time.monotonic() < deadline_s and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(server.requests) == 7
    with judge_server(lambda number, body: Say("[[B]]")) as server:
        found = evaluate(capsys, trained, *words, "--judge_url", server.url)["tasks"]["custom"]["result"]
        assert len(server.requests) == 16 - 6
    assert found["num_judged"] == 8


def test_the_key_is_in_no_file_and_on_no_screen(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "secret-key-of-mine")
    words = ["--tasks", "custom", "--prompts", write_prompts(tmp_path), "--max_new_tokens", 4, "--judge_model", "m"]
    words += ["--judge_key_env", "MY_JUDGE_KEY", *QUICK]
    with judge_server(lambda number, body: Say("[[A]] secret-key-of-mine")) as server:
        capsys.readouterr()
        assert main(["eval", str(trained), *map(str, words), "--judge_url", server.url, "--json"]) == 0
        shown = capsys.readouterr()
        assert server.headers[0]["Authorization"] == "Bearer secret-key-of-mine"
    assert "secret-key-of-mine" not in shown.out + shown.err
    for path in (trained / "eval").rglob("*"):
        assert not path.is_file() or b"secret-key-of-mine" not in path.read_bytes()


def test_published_answers_are_replayed_without_a_model(shared_data, tmp_path, capsys):
    """The authors' outputs on MT-Bench, judged by a server that rates by length."""
    answers = shared_data / "paper_outputs" / "mtbench_Mistral-ORPO-alpha.jsonl"
    words = ["--tasks", "mtbench", "--mtbench", shared_data / "mtbench", "--answers", answers, "--output", tmp_path, "--limit", "12"]
    with judge_server(lambda number, body: Say(f"[[{1 + len(body['messages'][1]['content']) % 10}]]")) as server:
        found = evaluate(capsys, *words, "--judge_url", server.url, "--judge_model", "m")["tasks"]["mtbench"]
        assert len(server.requests) == 24
    assert found["result"]["generator"] == "Mistral-ORPO-alpha (7B)"
    assert found["result"]["num_judged"] == 24
    assert found["models"] == {}


def test_mtbench_with_a_model(trained, shared_data, capsys):
    words = [trained, "--tasks", "mtbench", "--mtbench", shared_data / "mtbench", "--limit", "2", "--max_new_tokens", "4"]
    with judge_server(lambda number, body: Say("[[4]]")) as server:
        found = evaluate(capsys, *words, "--judge_url", server.url, "--judge_model", "m")["tasks"]["mtbench"]["result"]
    assert (found["score"]["value"], found["num_judged"]) == (4.0, 4)
    lines = (trained / "eval" / "mtbench-answers.jsonl").read_text().splitlines()
    assert len(json.loads(lines[0])["choices"][0]["turns"]) == 2


def test_alpacaeval_with_a_model_and_a_file_of_references(trained, tmp_path, capsys):
    reference = [{"instruction": f"Tell me about {n}", "output": "Something.", "generator": "reference"} for n in range(5)]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    words = [trained, "--tasks", "alpacaeval", "--alpaca_reference", tmp_path / "reference.json", "--alpaca_tables", tmp_path]
    with judge_server(lambda number, body: Say("m")) as server:
        found = evaluate(capsys, *words, "--max_new_tokens", "4", "--judge_url", server.url, "--judge_model", "m")["tasks"]["alpacaeval"]
        assert all(body["max_tokens"] == 8 for body in server.requests)
    result = found["result"]
    assert result["num_judged"] == 5
    assert result["num_wins"] + result["num_losses"] == 5
    assert result["length_controlled"] is None
    assert result["missing"]
    annotations = [json.loads(line) for line in (trained / "eval" / "alpacaeval-annotations.jsonl").read_text().splitlines()]
    assert [row["preference"] - 1 for row in annotations] == result["preferences"]


def test_ifeval_of_given_answers(shared_data, tmp_path, capsys):
    from orpo.errors import UserError
    from orpo.evaluate.tasks import ifeval

    try:
        ifeval.load_checkers()
    except UserError as error:
        pytest.skip(str(error))
    source = shared_data / "ifeval" / "input_data.jsonl"
    items = ifeval.read_items(source, limit=20)
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"prompt": item.prompt, "response": "no comma here"}) + "\n" for item in items)
    )
    words = ["--tasks", "ifeval", "--ifeval_prompts", source, "--limit", 20, "--answers", tmp_path / "answers.jsonl", "--output", tmp_path]
    found = evaluate(capsys, *words)["tasks"]["ifeval"]["result"]
    expected = ifeval.check_answers(items, ["no comma here"] * 20)
    assert found["prompt_strict"] == expected.prompt_strict.to_dict()
    assert found["num_prompts"] == 20
    lines = (tmp_path / "ifeval-answers.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["response"] == "no comma here"


def test_a_model_folder_is_evaluated_from_python(trained, shared_data, tmp_path, monkeypatch):
    """What a comparison calls: a folder, a task, a limit; the record comes back, lies in the output folder, and costs nothing again."""
    from orpo.errors import UserError
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.suite import Evaluation
    from orpo.evaluate.tasks import ifeval

    try:
        ifeval.load_checkers()
    except UserError as error:
        pytest.skip(str(error))
    prompts = shared_data / "ifeval" / "input_data.jsonl"
    options = EvalOptions(
        trained / "model", ("ifeval",), limit=7, ifeval_prompts=prompts, has_before=False, max_new_tokens=8, output=str(tmp_path)
    )
    records, errors = Evaluation(options).run()
    assert errors == {}
    record = records["ifeval"]
    assert (record["result"]["num_prompts"], record["target"], record["limit"]) == (7, str(trained / "model"), 7)
    kept = json.loads((tmp_path / "ifeval.json").read_text())
    assert kept["result"] == record["result"]
    lines = [json.loads(line) for line in (tmp_path / "ifeval-answers.jsonl").read_text().split("\n") if line]
    strict = [all(line["strict"]) for line in lines]
    assert record["result"]["prompt_strict"]["value"] == pytest.approx(sum(strict) / 7)
    monkeypatch.setattr("orpo.evaluate.answers.generate", lambda *args, **kwargs: pytest.fail("generated again"))
    again, _ = Evaluation(options).run()
    assert again["ifeval"]["result"] == record["result"]


def test_prompts_that_are_not_to_be_had_are_asked_for(trained, capsys, monkeypatch):
    from orpo.errors import DataError

    def offline(*args: object, **kwargs: object) -> None:
        raise DataError("the hub cannot be reached", where="google/IFEval")

    monkeypatch.setattr("orpo.evaluate.tasks.ifeval.read_items", offline)
    assert main(["eval", str(trained), "--tasks", "ifeval"]) == 2
    assert "--ifeval_prompts FILE" in capsys.readouterr().err


def test_one_task_that_cannot_be_done_does_not_keep_the_others(trained, capsys):
    words = ["eval", str(trained), "--tasks", "pairs,alpacaeval", "--alpaca_reference", "/nowhere/reference.json", "--json"]
    capsys.readouterr()
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "1 of 2 tasks could not be done" in shown.err
    facts = json.loads(shown.out)
    assert set(facts["tasks"]) == {"pairs"}
    assert set(facts["errors"]) == {"alpacaeval"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "pears"], "pairs, retention, ifeval"),
        (["--tasks", "mtbench"], "--mtbench"),
        (["--tasks", "custom"], "--prompts"),
        (["--tasks", "pairs", "--answers", "x.json"], "--answers"),
        (["--limit", "0"], "--limit"),
        (["--judge_options", "[1]"], "JSON object"),
        (["--tasks", "alpacaeval", "--alpaca_reference", "REFERENCE"], "needs a judge"),
        (["--tasks", "alpacaeval", "--alpaca_reference", "REFERENCE", "--judge_url", "http://x/v1"], "--judge_model"),
        (["--tasks", "alpacaeval", "--alpaca_reference", "REFERENCE", "--judge_url", "http://x/v1", "--judge", "y"], "two judges"),
        (["--tasks", "pairs", "--slice", "nothing"], "no row has a column"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_is_wrong_is_named_with_exit_code_2(trained, tmp_path, capsys, words, message):
    reference = tmp_path / "reference.json"
    reference.write_text('[{"instruction": "a", "output": "b"}]')
    capsys.readouterr()
    assert main(["eval", str(trained), *(str(reference) if word == "REFERENCE" else word for word in words)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_nothing_to_evaluate(capsys):
    assert main(["eval"]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert main(["eval", "smollm-typo/", "--tasks", "pairs", "--data", "x.jsonl"]) == 2


# ---- a real server -----------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served_model(smollm2_folder: Path) -> str:
    """transformers' own server with SmolLM2 on loopback; gives its base address."""
    pytest.importorskip("fastapi", reason='transformers serve is not installed (pip install "transformers[serving]")')
    pytest.importorskip("uvicorn", reason='transformers serve is not installed (pip install "transformers[serving]")')
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(smollm2_folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    # Two processes share the cores: threads that wait without spinning leave them to each other.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 300
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail("transformers serve did not come up")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_judges(served_model, smollm2_folder, trained, tmp_path, capsys):
    """SmolLM2 behind transformers serve: a poor judge, whose unreadable verdicts are counted, and whose replies are kept."""
    judge = EndpointJudge(served_model, str(smollm2_folder), timeout_s=120)
    reply = judge.reply(({"role": "user", "content": "Reply with the single word yes."},), 8)
    assert reply.text.strip()
    words = [trained, "--tasks", "custom", "--prompts", write_prompts(tmp_path, 2), "--max_new_tokens", 8, "--judge_model", smollm2_folder]
    words += ["--judge_options", '{"max_tokens": 24}', "--judge_workers", 2, "--judge_retries", 1, "--json"]
    outcomes = []
    for url in (served_model, "http://127.0.0.1:9/v1"):  # the second time nobody is there, and nobody is needed
        capsys.readouterr()
        outcomes.append((main(["eval", *map(str, words), "--judge_url", url]), capsys.readouterr()))
    kept = (trained / "eval" / "cache" / "judgements.jsonl").read_text().splitlines()
    assert len(kept) == 4
    (code, shown), (again, shown_again) = outcomes
    assert code == again
    if code == 0:
        result = json.loads(shown.out)["tasks"]["custom"]["result"]
        assert result["num_judged"] + result["num_malformed"] >= 2
        assert json.loads(shown_again.out)["tasks"]["custom"]["result"] == result
    else:  # not one verdict could be read: said, not guessed
        assert code == 2
        assert "verdicts cannot be read" in shown.err
        assert "verdicts cannot be read" in shown_again.err


# ---- several processes -----------------------------------------------------------------------------------------------------------------

TIMES = ("time_unix_s", "wall_s", "target")


def typed(*words: str, **environment: str) -> tuple[int, str]:
    """A command as a user types it, on one thread, and what it prints."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_", "ORPO_"))}
    given = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(words, env={**alone, **given}, capture_output=True, text=True, timeout=560, check=False)
    return done.returncode, done.stdout + done.stderr


def results_of(folder: Path) -> dict[str, object]:
    records = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {key: value for key, value in record.items() if key not in TIMES} for name, record in records.items()}


EVALUATION = ("--tasks", "pairs,retention", "--max_new_tokens", "6", "--dtype", "float32", "--temperature", "0.7")


@pytest.mark.slow
def test_several_processes_give_the_results_of_one(trained: Path, tmp_path: Path) -> None:
    """By our own short form and by torchrun: the same files but for times, one output."""
    orpo = (sys.executable, "-m", "orpo", "eval", str(trained), *EVALUATION)
    code, text = typed(*orpo, "--output", str(tmp_path / "one"))
    assert code == 0, text
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "orpo", *orpo[3:])
    for name, words in (("two", (*orpo, "--num_processes", "2")), ("three", torchrun)):
        code, text = typed(*words, "--output", str(tmp_path / name))
        assert code == 0, text
        assert text.count("results  ") == 1
        assert text.count("pairs: ") == 1
        assert results_of(tmp_path / name) == results_of(tmp_path / "one")


@pytest.mark.slow
def test_several_processes_say_what_is_wrong_once(trained: Path, tmp_path: Path) -> None:
    orpo = (sys.executable, "-m", "orpo", "eval", str(trained), "--num_processes", "2", "--output", str(tmp_path / "out"))
    for words, problem in (
        (("--tasks", "ifeval"), "ifeval"),
        (("--data", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("--against", str(tmp_path / "no-model")), "no-model"),
    ):
        code, text = typed(*orpo, *words)
        assert code == 2, text
        assert text.count("orpo eval:") == 1
        assert problem in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(trained: Path, tmp_path: Path) -> None:
    words = (sys.executable, "-m", "orpo", "eval", str(trained), *EVALUATION, "--num_processes", "2", "--output", str(tmp_path / "out"))
    process = subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("loading"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=200) == 130, rest
    assert "Traceback" not in rest
    code, text = typed(*words)
    assert code == 0, text
