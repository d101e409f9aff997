"""The preview shows the ids of training, says truly where each token comes from, and what it counts in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from htmlpages import HOSTILE, parse
from orpo.cli import main
from orpo.cli.preview import read_numbers
from orpo.data.formats import load_preferences
from orpo.data.preview import RowView, plain_lines, render_html, runs, token_texts, view_row
from orpo.data.template import TemplateEncoder
from orpo.data.types import Dropped, Preference, TokenGroup, Where
from orpo.errors import EXIT_USER, UserError

WORDS_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def talk(*contents: str) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))


def preference(prompt: Any, *responses: Any, pairs: tuple[tuple[int, int], ...] = ((0, 1),)) -> Preference:
    return Preference(prompt, responses, pairs, Where("rows.jsonl", 4, 5))


def view(encoder: TemplateEncoder, item: Preference, nll_scope: str = "sequence") -> tuple[RowView, TokenGroup]:
    group = encoder.encode(item)
    assert isinstance(group, TokenGroup)
    return view_row(item, encoder, nll_scope=nll_scope), group


def texts_by_role(row: RowView, segment: int) -> list[tuple[str, str]]:
    return [(run.role, run.text) for run in runs(row.segments[segment].tokens)]


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer: Any) -> TemplateEncoder:
    return TemplateEncoder(tiny_tokenizer, max_length=2000)


@pytest.mark.parametrize("nll_scope", ["sequence", "response"])
def test_ids_and_terms_are_those_of_training(encoder: TemplateEncoder, nll_scope: str) -> None:
    item = preference("What is a pen?", "A tool to write with.", "No idea, really.")
    row, group = view(encoder, item, nll_scope)
    prompt, chosen, rejected = row.segments
    assert [token.id for token in prompt.tokens] == group.prompt_ids.tolist()
    assert [token.id for token in chosen.tokens] == group.response_ids[0].tolist()
    assert [token.id for token in rejected.tokens] == group.response_ids[1].tolist()
    counted = sum(token.counts_in_nll for segment in row.segments for token in segment.tokens)
    expected = len(group.response_ids[0]) + (len(group.prompt_ids) - 1 if nll_scope == "sequence" else 0)
    assert counted == expected  # the first token of a sequence is predicted from nothing
    in_odds = [sum(token.counts_in_odds for token in segment.tokens) for segment in row.segments]
    assert in_odds == [0, len(group.response_ids[0]), len(group.response_ids[1])]


def test_roles(encoder: TemplateEncoder) -> None:
    row, _ = view(encoder, preference("is", "Assistant.", "user"))
    assert texts_by_role(row, 0) == [
        ("template", "<|im_start|>"),
        ("template", "user\n"),
        ("prompt", "is"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
    ]  # the first token is a run of its own, since it is not predicted
    assert texts_by_role(row, 1) == [("chosen", "Assistant."), ("eos", "<|im_end|>")]
    assert texts_by_role(row, 2) == [("rejected", "user"), ("eos", "<|im_end|>")]
    assert [segment.name for segment in row.segments] == ["prompt", "chosen", "rejected"]


def test_roles_in_a_template_of_ordinary_words(tiny_tokenizer_factory: Any) -> None:
    tokenizer = tiny_tokenizer_factory(chat_template=WORDS_TEMPLATE)
    item = preference(talk("one", "two", "three user:"), talk("", "yes")[1:], talk("", "no")[1:])
    row, _ = view(TemplateEncoder(tokenizer, max_length=2000), item)
    contents = "".join(text for role, text in texts_by_role(row, 0) if role == "prompt")
    assert contents == "onetwothree user:"
    headers = "".join(text for role, text in texts_by_role(row, 0) if role == "template")
    assert headers.count("### user:") == 2


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_truncation_is_marked(tiny_tokenizer: Any, truncation: str) -> None:
    short = TemplateEncoder(tiny_tokenizer, max_length=120, truncation=truncation)
    item = preference(talk("first question", "an answer", "the beginning " + "middle " * 200 + "the end"), "yes " * 200, "no")
    item = Preference(item.prompt, tuple(talk("", answer)[1:] for answer in ("yes " * 200, "no")), item.pairs, item.where)
    row, group = view(short, item)
    prompt, chosen, rejected = row.segments
    assert (prompt.is_cut, chosen.is_cut, rejected.is_cut) == (True, not group.is_ended[0], False)
    assert rejected.tokens[-1].role == "eos"
    if chosen.is_cut:
        assert chosen.tokens[-1].role == "chosen"
        assert any("answer's tail was cut" in note for note in row.notes)
    assert any("taken from the prompt" in note for note in row.notes)
    kept = "".join(text for role, text in texts_by_role(row, 0) if role == "prompt")
    assert ("the end" in kept) == (truncation == "keep_end")
    header = "".join(text for role, text in texts_by_role(row, 0) if role == "template")
    assert header.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "cut to fit max_length" in "\n".join(plain_lines(row))


def test_groups_and_sft_rows(encoder: TemplateEncoder) -> None:
    group_row, _ = view(encoder, preference("Q?", "best", "middle", "worst", pairs=((0, 1), (0, 2), (1, 2))))
    assert [segment.name for segment in group_row.segments[1:]] == [
        "answer 1: chosen over 2, 3",
        "answer 2: chosen over 3; rejected for 1",
        "answer 3: rejected for 1, 2",
    ]
    sft_row, _ = view(encoder, preference("Q?", "only", pairs=()))
    tokens = sft_row.segments[1].tokens
    assert all(token.counts_in_nll and not token.counts_in_odds for token in tokens)


def test_dropped_rows_say_why(tiny_tokenizer: Any) -> None:
    row = view_row(Dropped("empty_answer", Where("rows.jsonl", 2, 3), "rejected"), TemplateEncoder(tiny_tokenizer))
    assert (row.place, row.segments) == ("rows.jsonl:3", ())
    assert row.dropped == "empty_answer: an answer is empty or blank (rejected)"
    long = view_row(preference("Q? " * 500, "a", "b"), TemplateEncoder(tiny_tokenizer, max_length=50))
    assert long.dropped is not None
    assert long.dropped.startswith("prompt_too_long")


@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_pieces_join_to_the_decoded_text(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text + " 日本語🙂é", add_special_tokens=False)["input_ids"]
    pieces = token_texts(tiny_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tiny_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@given(prompt=st.text(min_size=1, max_size=40), chosen=st.text(min_size=1, max_size=40), rejected=st.text(min_size=1, max_size=40))
def test_any_text_can_be_shown(encoder: TemplateEncoder, prompt: str, chosen: str, rejected: str) -> None:
    items, dropped, _ = load_preferences(
        [{"prompt": "Q?", "chosen": "good", "rejected": "bad"}, {"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    )
    row = view_row(dropped[0] if dropped else items[-1], encoder)
    assert list(plain_lines(row))
    for segment in row.segments:
        assert all(token.role in {"template", "prompt", "chosen", "rejected", "eos"} for token in segment.tokens)


def test_the_page_shows_ids_and_keeps_data_inert(encoder: TemplateEncoder) -> None:
    row, group = view(encoder, preference(HOSTILE, HOSTILE + "1", HOSTILE + "2"))
    page = parse(render_html([row], encoder.describe(), source=HOSTILE, nll_scope="sequence"))
    assert not [tag for tag, _ in page.tags if tag in {"script", "img", "iframe"}]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name in {"src", "href"}]
    titles = [attributes["title"] or "" for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [int(title.split()[1]) for title in titles] == [*group.prompt_ids, *group.response_ids[0], *group.response_ids[1]]
    assert "alert(1)" in page.text


@pytest.mark.parametrize(("text", "numbers"), [("0", {0}), ("0,5, 10-12", {0, 5, 10, 11, 12}), (None, None)])
def test_row_numbers(text: str | None, numbers: set[int] | None) -> None:
    assert read_numbers(text, "--rows") == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1.5", "5-3", "0-999999999"])
def test_wrong_row_numbers(text: str) -> None:
    with pytest.raises(UserError, match="is no row number"):
        read_numbers(text, "--rows")


@pytest.fixture
def model_folder(tmp_path: Path, tiny_tokenizer_factory: Any, tiny_model_factory: Any) -> Path:
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Q{i}?", "chosen": "good", "rejected": "bad" if i != 2 else ""} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    base = ["preview", str(path), "--model", str(model_folder)]
    assert main([*base, "--rows", "1,2", "--lines", "9", "--html", str(tmp_path / "page.html")]) == 0
    out, _ = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith(str(path))] == [
        next(line for line in out.splitlines() if line.startswith(f"{path}:2:")),
        f"{path}:3: empty_answer: an answer is empty or blank (rejected)",
        next(line for line in out.splitlines() if line.startswith(f"{path}:9:")),
    ]
    assert "eos      NLL+OR" in out
    assert "Q8?" in parse((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert main([*base, "--rows", "99"]) == EXIT_USER
    assert "no row 99" in capsys.readouterr()[1]
    assert main(["preview", str(path)]) == EXIT_USER
    assert "no model is named" in capsys.readouterr()[1]


@pytest.mark.parametrize("weight", [None, 1])
def test_every_source_is_shown(weight: int | None, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = []
    for name, num in (("first", 2), ("second", 5)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": f"{name} {i}?", "chosen": "good", "rejected": "bad"}) for i in range(num)))
        sources.append({"path": str(path)} | ({} if weight is None else {"weight": weight}))
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model_name_or_path": str(model_folder), "dataset_name": sources}), encoding="utf-8")

    def shown(*options: str) -> list[str]:
        assert main(["preview", str(config), "--json", *options]) == 0
        return [Path(row["place"]).name for row in json.loads(capsys.readouterr()[0])["rows"]]

    assert shown("--num", "1") == ["first.jsonl:1", "second.jsonl:1"]
    assert shown("--rows", "0,3") == ["first.jsonl:1", "second.jsonl:1", "second.jsonl:4"]
    assert shown("--lines", "2") == ["first.jsonl:2", "second.jsonl:2"]
    assert main(["preview", str(config), "--rows", "1,5"]) == EXIT_USER
    assert "no row 5" in capsys.readouterr()[1]


def test_the_command_with_a_configuration(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Q?", "good": "good", "bad": "bad"}), encoding="utf-8")
    config = tmp_path / "run.yaml"
    keys = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(path),
        "column_map": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "nll_scope": "response",
    }
    config.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    assert main(["preview", str(config), "--max_length", "77"]) == 0
    out, _ = capsys.readouterr()
    assert "max_length 77" in out
    assert "template NLL" not in out  # nll_scope: response
    assert main(["audit", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr()[0])["tokens"]["percentiles"]["chosen"]
