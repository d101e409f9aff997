"""Every key of a run changes something that can be seen, or is refused, or is told by its name: none does nothing in silence."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.everykey import BESIDE, UNSEEN, VALUES
from cli.test_check_agrees import BASE
from faults.forked import Zygote
from orpo.run.keys import key_types

DEALT = Path(__file__).parents[1] / "snapshots" / "every_key.json"
"""Key -> how it is dealt with, as it was found."""
WAYS = {
    "seen": "the run is another one, or says something else",
    "refused": "by its name, since it cannot be meant so",
    "told": "by its name, to have no effect there",
    "allows": "what is refused without it",
    "nothing": "for a reason (UNSEEN)",
}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
"""Keys that the oldest transformers of those that are supported does not have."""
PARTS = ("code", "losses", "evaluations", "weights", "files", "record", "said")
CLOCK = re.compile(r"_s$|per_second|runtime|time|memory|wall|total_flos")
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")


def test_every_key_has_its_decision() -> None:
    """A new key needs a value in tests/cli/everykey.py, and its line in the snapshot (`pytest -m slow tests/cli/test_every_key.py`)."""
    dealt = json.loads(DEALT.read_text())
    keys = set(key_types()) | {"dpo_beta"}  # which is there once a comparison was imported
    assert keys <= set(VALUES)
    assert set(VALUES) - keys <= NEWER
    assert set(dealt) == set(VALUES)
    assert set(dealt.values()) <= set(WAYS)
    assert {key for key, how in dealt.items() if how == "nothing"} == set(UNSEEN), "what shows nothing needs its reason"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Any, tiny_tokenizer_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    tokenizer = tiny_tokenizer_factory()
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "tiny": ("llama", {}),
        "other": ("llama", {"seed": 1}),
        "dropout": ("llama", {"attention_dropout": 0.5}),
        "experts": ("mixtral", {"output_router_logits": True}),
    }
    for name, (family, fields) in kinds.items():
        tiny_model_factory(family, vocab_size=len(tokenizer), num_layers=2, hidden_size=64, **fields).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"Question {n}?", "chosen": f"A good answer to {n}.", "rejected": f"No. {n}!"} for n in range(16)]
    judged = [{"prompt": f"Question {n}?", "responses": ["Good.", "Fair.", f"Bad {n}."], "scores": [3, 2, 1]} for n in range(16)]
    files = {
        "rows": rows,
        "few": [{**row, "prompt": f"Another {row['prompt']}"} for row in rows[:6]],
        "judged": judged,
        "lone": [*rows, *({"prompt": f"Tell {n}.", "chosen": "This alone.", "rejected": None} for n in range(4))],
        "bad": [*rows, {"prompt": "", "chosen": "", "rejected": ""}],
        "special": [{**row, "chosen": f"{row['chosen']} <|im_start|>"} for row in rows],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plugin.py").write_text("print('the plugin was loaded')\n")
    (folder / "kept.txt").write_text("\n".join(["kept.txt", *(path.name for path in folder.iterdir())]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(VALUES))
def test_no_key_does_nothing_in_silence(key: str, place: Path, forks: Zygote) -> None:
    beside = {**BASE, **BESIDE.get(key, {})}
    without, given = _seen(forks, place, beside), _seen(forks, place, {**beside, key: VALUES[key]})
    assert _how(key, without, given) == json.loads(DEALT.read_text())[key]


def _how(key: str, without: dict[str, Any], given: dict[str, Any]) -> str:
    """One of `WAYS`."""
    if without["code"] == 2 and given["code"] == 0:
        return "allows"
    assert without["code"] in (0, 3), without["log"]
    if given["code"] == 2:
        assert key in given["log"], given["log"]
        return "refused"
    told = [line.partition("no effect")[0] for line in given["said"] - without["said"] if "no effect" in line]
    if any(NUMBER.sub("#", key) in line for line in told):
        return "told"
    return "nothing" if all(given[part] == without[part] for part in PARTS) else "seen"


def _seen(forks: Zygote, place: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a run leaves and says, without what no two runs share."""
    kept = set((place / "kept.txt").read_text().split())
    for path in place.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    forks.run("faults.checkjobs:train", place / "log", config=str(place / "run.yaml"), outcome=str(place / "outcome.json"))
    log = (place / "log").read_text()
    assert (place / "outcome.json").exists(), log
    assert "This is a bug in orpo" not in log, log
    run = place / config["output_dir"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if (run / "metrics.jsonl").exists() else []
    lines = [{name: value for name, value in one.items() if not CLOCK.search(name)} for one in metrics]
    return {
        "code": json.loads((place / "outcome.json").read_text()),
        "log": log,
        "losses": [one for one in lines if "eval_loss" not in one],
        "evaluations": [one for one in lines if "eval_loss" in one],
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.glob("[am]*/*.safetensors"))],
        "files": sorted(re.sub(r"\d{6,}.*", "#", str(path.relative_to(place))) for path in place.rglob("*") if path.parts[-1] not in kept),
        "record": _record(run / "run.json"),
        "said": {NUMBER.sub("#", line) for line in log.splitlines() if line.strip() and not line.startswith("step ")},
    }


def _record(path: Path) -> Any:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bare(item) for name, item in value.items() if not CLOCK.search(name) and name != "configuration"}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(json.loads(path.read_text())) if path.exists() else None
