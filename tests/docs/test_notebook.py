"""The tutorial notebook runs from top to bottom, offline, in a few steps; and what is committed of it is clean."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "orpo_finetuning_example.ipynb"
TINY = 'MODEL, BATCH, STEPS, NUM_TRAIN, NUM_HELD_OUT, ANSWER_TOKENS = "tiny", 2, 10, 20, 12, 8'
SMALL = "BATCH, STEPS, NUM_TRAIN, NUM_HELD_OUT, ANSWER_TOKENS = 4, 5, 20, 12, 8"
COMMANDS_OWN = ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""What `orpo` as a command sets for itself; commands that tests ran in this process have left it here."""
RESULTS = """
import json
facts = {name: summarise(held_out, found).to_dict() for name, found in scores.items()}
print(json.dumps({"steps": trainer.state.global_step, "pairs": [len(train_groups), len(held_out)], "scores": facts}))
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def texts(cell: Any) -> list[str]:
    """What a cell's outputs show."""
    return [text for output in cell.outputs for text in (output.get("text"), *output.get("data", {}).values()) if isinstance(text, str)]


def run(notebook: Any, parameters: str, folder: Path, last: str = "", *, threads: int = 1) -> Any:
    """A copy run from top to bottom in a kernel of its own, offline, as a reader would; its parameters are put in a cell behind theirs."""
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebook` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `notebook` is not installed")
    from nbformat.v4 import new_code_cell

    small = copy.deepcopy(notebook)
    (place,) = (number for number, cell in enumerate(small.cells) if "parameters" in cell.metadata.get("tags", []))
    small.cells.insert(place + 1, new_code_cell(parameters))
    small.cells.append(new_code_cell(last))
    client = nbclient.NotebookClient(small, timeout=800, resources={"metadata": {"path": str(folder)}})
    readers = {name: value for name, value in os.environ.items() if name not in COMMANDS_OWN}
    client.execute(env={**readers, "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, threads)), "HF_HUB_OFFLINE": "1"})
    return small


def facts_of(done: Any, steps: int) -> dict[str, Any]:
    """What the cell `RESULTS` has printed."""
    facts: dict[str, Any] = json.loads("".join(texts(done.cells[-1])).strip())
    assert facts["steps"] == steps
    assert facts["pairs"] == [20, 12]
    assert set(facts["scores"]) == {"start", "SFT", "SFT+DPO", "ORPO"}
    return facts


@pytest.fixture
def tiny(tmp_path: Path, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    """A folder to run a notebook in, with a model that trains in no time, `tiny`."""
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path


def test_it_runs_offline_and_shows_its_runs(notebook: Any, tiny: Path) -> None:
    done = run(notebook, TINY, tiny, RESULTS)
    facts_of(done, steps=10)
    shown = "\n".join(text for cell in done.cells if cell.cell_type == "code" for text in texts(cell))
    assert shown.count("step 10 of 10") == 3, "ORPO, SFT and DPO, each in a table that has grown to its end"
    assert shown.count("data:image/svg+xml") >= 3
    assert {path.name for path in tiny.iterdir()} == {"runs", "tiny"}, "nothing lies about but the runs' folders"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_learns(notebook: Any, smollm2_folder: Path, tmp_path: Path) -> None:
    """With the packaged model, and only the numbers small."""
    facts = facts_of(run(notebook, SMALL, tmp_path, RESULTS, threads=4), steps=5)
    margins = {name: summary["margin"]["value"] for name, summary in facts["scores"].items()}
    chosen = {name: summary["chosen_logp"]["value"] for name, summary in facts["scores"].items()}
    assert margins["ORPO"] > margins["start"], "ORPO parts the pairs"
    assert chosen["ORPO"] > chosen["start"]
    assert chosen["SFT"] > chosen["start"], "SFT raises the chosen answers"
    assert margins["SFT+DPO"] > margins["SFT"], "DPO parts what SFT left"


SMALL_OTHERS = {"audit_and_clean.ipynb": 'MODEL = "tiny"', "base_model_to_gguf.ipynb": 'MODEL, STEPS, BATCH = "tiny", 2, 2'}
NOTEBOOKS = sorted(NOTEBOOK.parent.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL_OTHERS)
def test_the_others_run_offline_from_top_to_bottom(name: str, tiny: Path) -> None:
    """With a tiny model in place of the packaged one; what they claim they assert themselves."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    done = run(nbformat.read(NOTEBOOK.parent / name, as_version=4), SMALL_OTHERS[name], tiny)
    shown = "\n".join(text for cell in done.cells if cell.cell_type == "code" for text in texts(cell))
    assert ("left because of" if "audit" in name else "largest difference") in shown


def test_every_notebook_is_known_here() -> None:
    assert {path.name for path in NOTEBOOKS} == {NOTEBOOK.name, *SMALL_OTHERS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_stand_alone(path: Path) -> None:
    """In Colab there is no checkout: the first cell of code installs where orpo is missing, and no path leads out of the folder."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    first = next(cell for cell in found.cells if cell.cell_type == "code")
    assert "install" in first.metadata["tags"]
    assert first.source.index('find_spec("orpo") is None') < first.source.index("subprocess.run")
    for cell in found.cells:
        assert "../" not in cell.source
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")


def test_one_line_changes_the_data(notebook: Any) -> None:
    """The line that the notebook offers is there, and stands for a hub data set that has both splits it asks for."""
    (parameters,) = (cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    (line,) = (line for line in parameters.split("\n") if line.startswith("DATA"))
    assert '"orpo-demo"' in line
    assert '"trl-lib/ultrafeedback_binarized"' in line
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "orpo-demo" not in code.replace(line, ""), "no other line knows which data it is"


SHOWN = {
    NOTEBOOK.name: ("SFT+DPO", "accuracy", "step 38 of 38", "data:image/svg+xml"),
    "audit_and_clean.ipynb": ("left because of", "<table"),
    "base_model_to_gguf.ipynb": ("step 20 of 20", "data:image/svg+xml", "largest difference"),
}
"""What a reader sees of a notebook that was not run: of each the results, and the table that has grown while it trained."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_has_outputs_and_no_noise(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    shown = "\n".join(text for cell in cells for text in texts(cell))
    for part in SHOWN[path.name]:
        assert part in shown
    for cell in cells:
        assert all(output.get("name") != "stderr" and output.output_type != "error" for output in cell.outputs)
        assert not {"execution", "ExecuteTime"} & set(cell.metadata)
    for noise in ("/home/", "/root/", "/tmp/", "/Users/", "Warning", "warning:", "Traceback", "site-packages"):
        assert noise not in shown
