"""The example that the project started from, with only its import line changed; and TRL's own way of writing it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import orpo
from tinymodels import build_tiny_model, build_tiny_tokenizer

EXAMPLE = """
from orpo import ORPOConfig, ORPOTrainer

# Configure ORPO training
orpo_config = ORPOConfig(
    learning_rate=1e-5,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    max_steps=1000,
    orpo_alpha=1.0,  # Controls strength of preference optimization
    orpo_beta=0.1,   # Temperature parameter for odds ratio
)

# Initialize trainer
trainer = ORPOTrainer(
    model=model,
    args=orpo_config,
    train_dataset=dataset,
    tokenizer=tokenizer,
)

# Start training
trainer.train()
"""

TRL_SCRIPT = """
from orpo import ORPOConfig, ORPOTrainer

training_args = ORPOConfig(
    output_dir="tiny-orpo",
    beta=0.1,
    max_length=256,
    max_steps=1000,
    per_device_train_batch_size=4,
    gradient_checkpointing=True,
    logging_steps=1,
    report_to="none",
)
trainer = ORPOTrainer(
    model=model_name,
    args=training_args,
    train_dataset=dataset,
    eval_dataset={"held_out": held_out},
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"),
)
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(training_args.output_dir)
"""

THINGS = ("boat", "sea", "harbour", "storm", "wind", "password", "settings", "account")
ROWS = [
    {"prompt": f"Tell me about the {one} and the {other}.", "chosen": f"The {one} is fine, thank you.", "rejected": f"No {other}."}
    for one in THINGS
    for other in THINGS[:3]
]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the reader of the example has: model, tokenizer, data set, and a folder to work in. Two steps in place of a thousand."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    build_tiny_model("llama", vocab_size=384, num_layers=1).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    config = orpo.ORPOConfig
    monkeypatch.setattr(orpo, "ORPOConfig", lambda **options: config(**{**options, "max_steps": 2}), raising=False)
    monkeypatch.chdir(tmp_path)
    held_out = [{"prompt": f"And the {thing}?", "chosen": "It is light.", "rejected": "I would rather not say."} for thing in THINGS[:3]]
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "model_name": str(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "dataset": Dataset.from_list(ROWS),
        "held_out": Dataset.from_list(held_out),
        "LoraConfig": LoraConfig,
    }


def test_the_seeds_example_runs(given: dict[str, Any], tmp_path: Path) -> None:
    exec(compile(EXAMPLE, "example.py", "exec"), given)  # noqa: S102
    trainer = given["trainer"]
    assert trainer.state.global_step == 2
    assert (trainer.training_objective.orpo_alpha, trainer.training_objective.orpo_beta) == (1.0, 0.1)
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_a_script_for_trl_runs(given: dict[str, Any], tmp_path: Path) -> None:
    exec(compile(TRL_SCRIPT, "script.py", "exec"), given)  # noqa: S102
    assert given["trainer"].state.global_step == 2
    assert given["trainer"].training_objective.orpo_alpha == 0.1
    assert "eval_held_out_rewards/margins" in given["metrics"]
    assert (tmp_path / "tiny-orpo" / "adapter_model.safetensors").exists()


def test_the_example_is_the_seeds(shared_data: Path) -> None:
    """Word for word but for the import."""
    seed = shared_data.parent / "SEED.md"
    if not seed.is_file():
        pytest.skip("the seed document is not here")
    (block,) = re.findall(r"```python\n(.*?)```", seed.read_text(encoding="utf-8"), re.DOTALL)
    assert block.strip() == EXAMPLE.strip().replace("from orpo import", "from trl import")
