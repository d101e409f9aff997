"""A tokenizer is read by its own rules, or refused: words that run together would be trained without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from orpo.errors import UserError
from orpo.models.load import load_model, load_tokenizer
from orpo.models.tokenizer import TEXT, as_tokenizer, read_tokenizer
from realtokenizers import FOLDER as REAL
from tinymodels import build_tiny_model, build_tiny_tokenizer
from tokenizerrules import gemma_like, llama3_like, qwen2_like, sentencepiece_like, smollm_like


def ids(tokenizer: Any) -> list[int]:
    return tokenizer.encode(TEXT, add_special_tokens=False)


@pytest.fixture
def misnamed(tmp_path: Path) -> Path:
    """A model with a byte-level tokenizer whose configuration names another class, as DeepSeek's do."""
    tokenizer, folder = build_tiny_tokenizer(), tmp_path / "misnamed"
    build_tiny_model("llama", vocab_size=len(tokenizer), num_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def test_a_tokenizer_whose_class_is_misnamed_is_read_by_its_own_file(misnamed: Path) -> None:
    found = load_tokenizer(misnamed)
    assert ids(found) == ids(build_tiny_tokenizer())
    assert found.decode(ids(found)) == TEXT
    assert ids(load_model(misnamed).tokenizer) == ids(found)
    found.save_pretrained(misnamed / "again")
    assert ids(AutoTokenizer.from_pretrained(misnamed / "again")) == ids(found), "what a run saves is read rightly by everybody"


def test_that_it_was_is_told(misnamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions of transformers look into the file themselves."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", LlamaTokenizer.from_pretrained)
    loaded = load_model(misnamed)
    assert ids(loaded.tokenizer) == ids(build_tiny_tokenizer())
    assert any("loses the blanks between words" in note for note in loaded.facts.notes)


def test_one_that_was_read_wrongly_is_refused_and_the_mend_works(misnamed: Path) -> None:
    wrong = LlamaTokenizer.from_pretrained(misnamed)
    assert wrong.decode(ids(wrong)) != TEXT
    with pytest.raises(UserError, match="loses the blanks") as caught:
        as_tokenizer(wrong)
    command = str(caught.value.mend).split("`")[1]
    assert command == f"transformers.PreTrainedTokenizerFast.from_pretrained('{misnamed}')"
    mended = as_tokenizer(PreTrainedTokenizerFast.from_pretrained(str(misnamed)))
    assert ids(mended) == ids(build_tiny_tokenizer())


def _of_words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "What": 1, "is": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<unk>")


def _of_characters() -> Any:
    """Blanks are thrown away, in the file too."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({character: number for number, character in enumerate("?,Waehinmorstdy")}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?", eos_token="?")


def _of_word_pieces() -> Any:
    """In lower case, without blanks of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", "what", "is", "it", ",", "and", "how", "many", "are", "there", "?"]
    plain = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer, plain.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="[UNK]")


def _without_unknown() -> Any:
    """Of most texts it makes nothing at all."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"What": 0}, unk_token="<unk>")), eos_token="What")


SOUND = (
    build_tiny_tokenizer, smollm_like, llama3_like, qwen2_like, sentencepiece_like, gemma_like, _of_words, _of_characters, _of_word_pieces,
    _without_unknown,
)  # fmt: skip


@pytest.mark.parametrize("build", SOUND, ids=lambda build: build.__name__)
def test_a_sound_tokenizer_is_never_refused(build: Callable[[], Any], tmp_path: Path) -> None:
    """As it was built, and as it is read from a folder, whatever it does with blanks."""
    tokenizer = build()
    assert as_tokenizer(tokenizer) is tokenizer
    tokenizer.save_pretrained(tmp_path)
    found, notes = read_tokenizer(str(tmp_path))
    assert as_tokenizer(found) is found
    assert not notes
    assert type(found) is type(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "gptoss", "llama3_1", "qwen3"])
def test_a_real_tokenizer_gives_the_ids_of_its_file(name: str) -> None:
    from tokenizers import Tokenizer

    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {name} is not here: make tokenizers")
    found = load_tokenizer(REAL / name)
    assert as_tokenizer(found) is found
    own = Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    for text in (TEXT, "naïve café\n\n    def f(x):\n\treturn 東京 🙂  two", " What  is\r\nit?"):
        assert found.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False).ids
