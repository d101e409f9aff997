"""What Ollama would print from a Modelfile is what the chat template prints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orpo.models.modelfile import turns_of, write_modelfile
from tinymodels import CHATML_TEMPLATE, build_tiny_tokenizer

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML_TEMPLATE
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA32 = (
    "{{ bos_token }}{% set given = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n' + given + '<|eot_id|>' }}"
    "{% for m in messages if m.role != 'system' %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BRACES = CHATML_TEMPLATE.replace("'<|im_start|>'", "'{{<|im_start|>'")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "default": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "llama32": LLAMA32,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "inst": INST,
    "braces": BRACES,
}
FOLDING = GEMMA.replace("{{ raise_exception('no system') }}", "{{ messages[0].content.upper() }}")
COUNTING = CHATML_TEMPLATE.replace("message['role'] +", "message['role'] + loop.index | string +")

TALKS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": 'a "quoted" {{ .Content }}\n\n<b>bold</b>'},
        {"role": "assistant", "content": "one\ntwo"},
        {"role": "user", "content": "日本 🙂"},
    ],
]
WITH_SYSTEM = [[{"role": "system", "content": "Be {brief}."}, *talk] for talk in TALKS]


def go_print(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that Modelfiles use here: texts, `if`, `else if`, `range` over the messages, two fields."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    tokens = [part[2:-2].strip() if number % 2 else ("text", part) for number, part in enumerate(parts)]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    text, end = _block(tokens, 0, {".System": system, ".Messages": messages})
    assert end == len(tokens)
    return text


def _block(tokens: list[Any], at: int, values: dict[str, Any]) -> tuple[str, int]:
    """Text of a block from `at` up to its `end` or `else`."""
    text = ""
    while at < len(tokens):
        token = tokens[at]
        if isinstance(token, tuple):
            text += token[1]
        elif token == "end" or token.startswith("else"):
            break
        elif token.startswith('"'):
            text += json.loads(token)
        elif token.startswith("range"):
            start = at + 1
            for message in values[".Messages"]:
                part, at = _block(tokens, start, {**values, "$m.Role": message["role"], "$m.Content": message["content"]})
                text += part
        elif token.startswith("if"):
            is_done, condition = False, token
            while True:
                part, at = _block(tokens, at + 1, values)
                is_met = not is_done and (condition == "else" or _holds(condition.removeprefix("else ").removeprefix("if "), values))
                text += part if is_met else ""
                is_done = is_done or is_met
                if tokens[at] == "end":
                    break
                condition = tokens[at]
        else:
            text += values[token]
        at += 1
    return text, at


def _holds(condition: str, values: dict[str, Any]) -> bool:
    verb, name, *literal = condition.split(" ", 2)
    return not values[name] if verb == "not" else values[name] == json.loads(literal[0])


def real_go(template: str, messages: list[dict[str, str]], folder: Path) -> str:
    program = folder / "main.go"
    program.write_text(
        'package main\nimport ("encoding/json"; "os"; "text/template")\n'
        "type M struct { Role, Content string }\ntype D struct { System string; Messages []M }\n"
        "func main() { var d D; json.NewDecoder(os.Stdin).Decode(&d); t, _ := os.ReadFile(os.Args[1])\n"
        ' template.Must(template.New("t").Parse(string(t))).Execute(os.Stdout, d) }\n'
    )
    (folder / "t.tmpl").write_text(template)
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = json.dumps({"System": system, "Messages": messages})
    command = ["go", "run", str(program), str(folder / "t.tmpl")]
    return subprocess.run(command, input=data, capture_output=True, text=True, check=True).stdout


def template_of(modelfile: Path) -> str | None:
    found = re.search(r'TEMPLATE """(.*?)"""', modelfile.read_text(), re.DOTALL)
    return found[1] if found else None


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_prints_what_the_template_prints(name: str, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(chat_template=TEMPLATES[name])
    path = write_modelfile(tmp_path / "m.gguf", tokenizer)
    template = template_of(path)
    assert template is not None
    has_system = "Ollama would leave one out" not in path.read_text()
    assert has_system == (name not in ("gemma", "inst"))
    for talk in TALKS + (WITH_SYSTEM if has_system else []):
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert go_print(template, talk) == expected
        if shutil.which("go"):
            assert real_go(template, talk, tmp_path) == expected


def test_the_beginning_of_a_text_is_not_there_twice(tmp_path: Path) -> None:
    """Where the tokenizer puts it, and with it llama.cpp, the template leaves it out."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tiny_tokenizer(chat_template=LLAMA3)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    template = template_of(write_modelfile(tmp_path / "m.gguf", tokenizer))
    assert template is not None
    (talk, *_) = TALKS
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>" + go_print(template, talk) == expected


@pytest.mark.parametrize("template", [FOLDING, COUNTING, None], ids=["folding", "counting", "none"])
def test_a_template_that_go_cannot_say_is_left_out(template: str | None, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(chat_template=template)
    turns = turns_of(tokenizer)
    text = write_modelfile(tmp_path / "m.gguf", tokenizer).read_text()
    if template is FOLDING:  # without a system message it can be said; that one is missing is said too
        assert turns is not None
        assert turns.system is None
    else:
        assert turns is None
        assert "TEMPLATE" not in text.replace("# The chat template", "")
    assert text.startswith("FROM ./m.gguf\n")


def test_stops_and_a_system_message(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    text = write_modelfile(tmp_path / "m.gguf", tokenizer, stop_token_ids=[0, 2], system='Say "hi".\nTwice.').read_text()
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text
    assert 'SYSTEM """Say "hi".\nTwice."""' in text
