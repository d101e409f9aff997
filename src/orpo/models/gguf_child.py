"""Run llama.cpp's converter in a process of its own: `python gguf_child.py CONVERTER FACTS.json [its arguments]`.

Started by `orpo.models.gguf_convert` and importing nothing of this package. The converter is other people's program; it gets no network and
runs no code that comes with a model. What it does not know of a tokenizer it is told: the facts hold the special tokens as transformers
uses them, and the whole vocabulary where its rule is one that llama.cpp has.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNKNOWN = (NotImplementedError, FileNotFoundError, ValueError)
"""What the converter raises for a tokenizer that it does not know: by the hash of a text's tokens, or since there is no tokenizer.model."""


def main() -> None:
    """Convert, or end with the converter's own words."""
    script, facts = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    _cut_off_network()
    _refuse_remote_code()
    sys.argv = [str(script), *sys.argv[3:]]
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]  # its own gguf, not the one that is installed
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", script)
    assert spec is not None  # noqa: S101  (a .py file always has one)
    assert spec.loader is not None  # noqa: S101
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    classes: Any = sys.modules.get("conversion.base", converter)  # older scripts are one file
    _add_former_names(getattr(classes, "ModelBase", classes.TextModel))
    _tell_tokenizer(classes.TextModel, facts)
    converter.main()


def _cut_off_network() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the converter runs without network")

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, refuse)


def _refuse_remote_code() -> None:
    """The converter asks for `trust_remote_code=True` wherever it opens a tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    for kind in (AutoConfig, AutoTokenizer):
        kind.from_pretrained = _without_remote_code(kind.from_pretrained)


def _without_remote_code(load: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "trust_remote_code": False, "local_files_only": True})

    return wrapped


def _add_former_names(model: Any) -> None:
    """Settings under the names that the converter looks for, where transformers 5 has them under others."""
    load = model.load_hparams

    def load_hparams(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = load(*args, **kwargs)
        rotated = (found.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        former = {"gpt2": {"n_ctx": found.get("n_positions")}, "gpt_neox": {"rotary_pct": rotated}, "cohere2": {"rotary_pct": rotated}}
        return {**former.get(str(found.get("model_type")), {}), **found}

    model.load_hparams = staticmethod(load_hparams)


def _tell_tokenizer(text_model: Any, facts: dict[str, Any]) -> None:
    original = text_model.prepare_metadata

    def prepare_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        own = self.set_vocab
        self.set_vocab = lambda: _set_vocab(self, own, facts)
        original(self, *args, **kwargs)

    text_model.prepare_metadata = prepare_metadata


def _set_vocab(model: Any, own: Callable[[], None], facts: dict[str, Any]) -> None:
    vocabulary = facts["vocabulary"]
    if vocabulary is not None and vocabulary["model"] == "llama":
        # Without a tokenizer.model, which transformers no longer writes, the converter gives every piece the same score: other merges.
        _add_vocabulary(model.gguf_writer, vocabulary)
    else:
        try:
            own()
        except _UNKNOWN as error:
            _set_other_vocab(model, vocabulary, error)
    writer = model.gguf_writer
    _one_token_a_row(writer)
    for key, (setter, value) in facts["special"].items():
        for shard in writer.kv_data:
            shard.pop(key, None)  # a key that is set twice is written twice
        getattr(writer, setter)(value)


def _one_token_a_row(writer: Any) -> None:
    """llama.cpp takes a file only with as many tokens as the embeddings have rows; rows beyond the tokenizer's are named here."""
    rows = next((tensors["token_embd.weight"].shape[0] for tensors in writer.tensors if "token_embd.weight" in tensors), None)
    unused = 5  # GGUF's type of such tokens
    for shard in writer.kv_data:
        if rows is None or "tokenizer.ggml.tokens" not in shard:
            continue
        tokens = shard["tokenizer.ggml.tokens"].value
        missing = range(len(tokens), rows)
        kinds: dict[str, Any] = {"tokens": [f"[PAD{index}]" for index in missing], "token_type": [unused] * len(missing)}
        kinds["scores"] = [-10000.0] * len(missing)
        for name, more in kinds.items():
            if (stored := shard.get(f"tokenizer.ggml.{name}")) is not None:
                stored.value = [*stored.value, *more][:rows]


def _set_other_vocab(model: Any, vocabulary: dict[str, Any] | None, error: Exception) -> None:
    """The tokenizer as the converter reads it in other families, or as it was told.

    Raises:
        Exception: that of the converter, where nobody knows the tokenizer.
    """
    if vocabulary is not None and vocabulary["model"] == "gpt2":
        try:  # some families look for a tokenizer.model alone, though theirs may be of the other kind
            model._set_vocab_gpt2()
        except _UNKNOWN:
            pass
        else:
            return
    if vocabulary is None or not vocabulary["pre"]:
        raise error
    _add_vocabulary(model.gguf_writer, vocabulary)


def _add_vocabulary(writer: Any, vocabulary: dict[str, Any]) -> None:
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if vocabulary["merges"]:
        writer.add_token_merges(vocabulary["merges"])
    if vocabulary["scores"]:
        writer.add_token_scores(vocabulary["scores"])
    writer.add_add_space_prefix(vocabulary["has_space_prefix"])


if __name__ == "__main__":
    main()
