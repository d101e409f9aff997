"""A chat template that prints the date: taken once, kept, and nobody else's."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from chatcorpus import WRITTEN, corpus_tokenizer
from orpo.cli import main
from orpo.data.template import TemplateEncoder
from orpo.data.types import Preference, TokenGroup, Where
from orpo.inference.ready import Loading, Target, load_subject
from tinymodels import build_tiny_model

ROW = Preference("Hello", ("Yes", "No"), ((0, 1),), Where("rows.jsonl", 0, 1))
DATED = sorted(name for name, source in WRITTEN.items() if "strftime_now" in source)


def text_of(encoder: TemplateEncoder) -> str:
    group = encoder.encode(ROW)
    assert isinstance(group, TokenGroup)
    return str(encoder.tokenizer.decode(group.prompt_ids))


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_the_one_that_was_kept(name: str) -> None:
    """This is the contract with transformers: the function of the compiled template can be replaced, and is put back."""
    tokenizer = corpus_tokenizer(name)
    encoder = TemplateEncoder(tokenizer, date="1987-03-09T08:30:00")
    assert "1987" in text_of(encoder)
    assert "1987" in tokenizer.decode(encoder.prompt_ids("Hello"))
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "1987" not in plain
    assert encoder.describe()["date"] == "1987-03-09T08:30:00"
    again = TemplateEncoder(tokenizer, date=encoder.describe()["date"])
    assert text_of(again) == text_of(encoder)


def test_two_encoders_keep_their_own_dates() -> None:
    """transformers shares the compiled template among all tokenizers that have the same text."""
    tokenizer = corpus_tokenizer("roles_dated")
    old, new = TemplateEncoder(tokenizer, date="1987-03-09"), TemplateEncoder(tokenizer, date="2011-12-24")
    for _ in range(2):
        assert "March 09, 1987" in text_of(old)
        assert "December 24, 2011" in text_of(new)


def test_a_date_that_was_not_given_is_the_moment_of_making() -> None:
    encoder = TemplateEncoder(corpus_tokenizer("roles_dated"))
    assert abs((datetime.now() - datetime.fromisoformat(encoder.describe()["date"])).total_seconds()) < 3600
    assert TemplateEncoder(corpus_tokenizer("chatml_tools")).describe()["date"] is None


def test_a_run_keeps_the_date_of_its_first_start(tmp_path: Path) -> None:
    """What run.json holds from a first start is used when the command runs again, and when the run or its base is evaluated."""
    tokenizer = corpus_tokenizer("roles_dated")
    base, output = tmp_path / "base", tmp_path / "run"
    build_tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    output.mkdir()
    (output / "run.json").write_text('{"format": 1, "data": {"template": {"date": "1987-03-09T08:30:00"}}}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "Question {i}?", "chosen": "Yes {i}.", "rejected": "No."}}' for i in range(8)))
    words = f"train --model_name_or_path {base} --dataset_name {rows} --use_cpu true --max_steps 1 --per_device_train_batch_size 2"
    assert main([*words.split(), "--output_dir", str(output), "--max_length", "512"]) == 0
    assert json.loads((output / "run.json").read_text())["data"]["template"]["date"] == "1987-03-09T08:30:00"
    for name, config in ((str(output), None), (str(base), Target.find(str(output)).config)):
        subject = load_subject(name, Loading(device="cpu"), config=config)
        assert "March 09, 1987" in subject.tokenizer.decode(subject.encoder.prompt_ids("Hello"))
