"""Where the package mistral-common is installed, AutoTokenizer takes its tokenizer, which has no chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chattemplates import build_tokenizer
from orpo.data.template import TemplateEncoder
from orpo.errors import DataError, UserError
from orpo.models.load import load_tokenizer

mistral_common = pytest.importorskip("mistral_common", reason="the package mistral-common is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Mistral model's tokenizer as it is published: tekken.json and no other."""
    data = sorted((Path(mistral_common.__file__).parent / "data").glob("tekken*.json"))[-1]
    shutil.copy(data, tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return tmp_path


def test_the_tokenizer_json_beside_it_is_taken(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert TemplateEncoder(tokenizer).describe()["terminator"] == "<|im_end|>"


def test_without_one_it_is_the_users_to_give(folder: Path) -> None:
    with pytest.raises(UserError, match="tekken.json. and no other"):
        load_tokenizer(str(folder))


def test_one_given_from_python_is_refused_with_the_way_out(folder: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(DataError, match="PreTrainedTokenizerFast"):
        TemplateEncoder(AutoTokenizer.from_pretrained(folder))
