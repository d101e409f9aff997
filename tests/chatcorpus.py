"""Forty chat templates after the ideas of real model families, beyond the plain ones of `chattemplates`, and those that TRL ships.

Written for these tests. Each has the traits that make its family hard: what opens and closes an answer, what is only printed for the last
turn, how calls, tools and reasoning are printed, or are not.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from chattemplates import STYLES, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_END = "{% endif %}"
_FOR = "{% for m in messages %}"
_DONE = "{% endfor %}"
_GEN = "{% if add_generation_prompt %}"
_IM_GEN = _GEN + "<|im_start|>assistant\n" + _END
_CALLS = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{% set f = c.function if c.function else c %}"
    '{{ "\n" }}<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments if f.arguments is string else f.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}"
)
_TOOLS = "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}"
# Sets `think` and `text` of a message: its reasoning, from its field or from tags in its text, and the rest.
_SPLIT = (
    "{% set text = m.content or '' %}{% set think = m.reasoning_content or '' %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set think = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
)
# Sets `ns.last` to the place of the last user turn.
_LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_ALTERNATE = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% endfor %}"
)

WRITTEN: dict[str, str] = {
    # ChatML and its kin.
    "chatml_tools": (
        "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' }}"
        + _TOOLS
        + "<|im_end|>\n"
        + _FOR
        + "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
        + "{% elif not (m.role == 'system' and loop.first) %}<|im_start|>{{ m.role }}"
        + "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        + _CALLS
        + "<|im_end|>\n{% endif %}"
        + _DONE
        + _IM_GEN
    ),
    "chatml_trims": _FOR + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n" + _DONE + _IM_GEN,
    "chatml_blank_before": (
        _FOR + "<|im_start|>{{ m.role }}\n{{ ' ' if m.role == 'assistant' else '' }}{{ m.content }}<|im_end|>\n" + _DONE + _IM_GEN
    ),
    "chatml_wrapped": (
        _FOR
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<|open|>{{ m.content }}<|close|>{% else %}{{ m.content }}{% endif %}"
        + "<|im_end|>\n"
        + _DONE
        + _IM_GEN
    ),
    "chatml_with_bos": "{{ bos_token }}" + _FOR + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + _DONE + _IM_GEN,
    "chatml_named": (
        _FOR + "<|im_start|>{{ m.role }}{% if m.name %} name={{ m.name }}{% endif %}{{ '\n' + m.content }}<|im_end|>\n" + _DONE + _IM_GEN
    ),
    "im_sep": (
        _FOR + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>" + _DONE + _GEN + "<|im_start|>assistant<|im_sep|>" + _END
    ),
    "newline_first": "\n"
    + _FOR
    + "{{ '\n' }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    + _DONE
    + _GEN
    + "{{ '\n' }}<|im_start|>assistant\n"
    + _END,
    # Reasoning.
    "reasoning_kept": (
        _FOR
        + _SPLIT
        + "<|im_start|>{{ m.role }}\n{% if think %}<think>\n{{ think }}\n</think>\n\n{% endif %}{{ text }}<|im_end|>\n"
        + _DONE
        + _IM_GEN
    ),
    "reasoning_last_only": (
        _LAST
        + _FOR
        + _SPLIT
        + "<|im_start|>{{ m.role }}\n{% if think and loop.index0 > ns.last %}<think>\n{{ think }}\n</think>\n\n{% endif %}{{ text }}"
        + _CALLS
        + "<|im_end|>\n"
        + _DONE
        + _IM_GEN
    ),
    "think_switch": (
        _LAST
        + _FOR
        + _SPLIT
        + "<|im_start|>{{ m.role }}\n"
        + "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ think }}\n</think>\n\n{% endif %}"
        + "{{ text }}"
        + _CALLS
        + "<|im_end|>\n"
        + _DONE
        + _GEN
        + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        + "{% else %}<think>\n{% endif %}"
        + _END
    ),
    "no_think": (
        _LAST
        + _FOR
        + _SPLIT
        + "<|im_start|>{{ m.role }}\n"
        + "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ think }}\n</think>\n\n{% endif %}"
        + "{{ text }}<|im_end|>\n"
        + _DONE
        + _GEN
        + "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
        + _END
    ),
    "think_closed": (
        _FOR
        + _SPLIT
        + "<SPECIAL_11>{{ m.role | title }}\n{% if m.role == 'assistant' %}<think>{{ think }}</think>{% endif %}{{ text | trim }}\n"
        + "{% if m.role == 'assistant' %}<SPECIAL_12>\n{% endif %}"
        + _DONE
        + _GEN
        + "<SPECIAL_11>Assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>"
        + "{% else %}<think>\n{% endif %}"
        + _END
    ),
    "distilled": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        + _FOR
        + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        + "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end｜>{% endif %}"
        + _DONE
        + _GEN
        + "<｜Assistant｜><think>\n"
        + _END
    ),
    "tilde_marks": (
        _FOR
        + _SPLIT
        + "]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{% if m.role == 'assistant' and think and loop.last %}"
        + "<think>\n{{ think }}\n</think>\n{% endif %}{{ text }}[e~[\n"
        + _DONE
        + _GEN
        + "]~b]ai\n<think>\n"
        + _END
    ),
    "think_in_system": (
        "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
        + "Reason first, between <think> and </think>, then answer.{% endif %}<|im_end|>\n"
        + _FOR
        + "{% if not (m.role == 'system' and loop.first) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        + _DONE
        + _IM_GEN
    ),
    "bracket_think": (
        "{{ bos_token }}"
        + _FOR
        + "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        + "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        + "{% else %}{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]"
        + "{% endif %}{{ m.content }}{{ eos_token }}{% endif %}"
        + _DONE
    ),
    # Turns in brackets.
    "inst_sys": (
        _ALTERNATE
        + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        + "{% if loop.first and messages[0].role == 'system' %}<<SYS>>\n"
        + "{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        + "{% else %} {{ m.content | trim }} {{ eos_token }}"
        + "{% endif %}"
        + _DONE
    ),
    "inst_tools": (
        "{{ bos_token }}"
        + _FOR
        + "{% if m.role == 'user' %}{% if tools and loop.last or tools and loop.revindex == 2 %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
        + "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
        + "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        + "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}"
        + "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
        + _DONE
    ),
    "system_prompt_marks": (
        "{{ bos_token }}"
        + _FOR
        + "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        + "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        + "{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        + "{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
        + "{% else %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}"
        + _DONE
    ),
    # Headers of several tokens, dates.
    "headers_dated": (
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
        + "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}\n\n"
        + "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
        + _FOR
        + "{% if not (m.role == 'system' and loop.first) %}<|start_header_id|>"
        + "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
        + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endif %}"
        + _DONE
        + _GEN
        + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        + _END
    ),
    "roles_dated": (
        "<|start_of_role|>system<|end_of_role|>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
        + "Knowledge ends in April 2024.\nToday's Date: {{ strftime_now('%B %d, %Y') }}.{% endif %}"
        + "{% if tools %}<|tools|>{{ tools | tojson(indent=4) }}{% endif %}<|end_of_text|>\n"
        + _FOR
        + "{% if not (m.role == 'system' and loop.first) %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        + "{% if m.tool_calls %}<|tool_call|>{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        + "{% endif %}<|end_of_text|>\n{% endif %}"
        + _DONE
        + _GEN
        + "<|start_of_role|>assistant<|end_of_role|>"
        + _END
    ),
    # Closing wrappers.
    "response_wrapped": (
        "{{ bos_token }}"
        + _FOR
        + "<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>{{ m.content }}{% elif m.role == 'system' %}<|SYSTEM_TOKEN|>"
        + "{{ m.content }}{% else %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>"
        + _DONE
        + _GEN
        + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"
        + _END
    ),
    "actions_wrapped": (
        "{{ bos_token }}"
        + _FOR
        + "<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.reasoning_content %}<|START_THINKING|>"
        + "{{ m.reasoning_content }}<|END_THINKING|>{% endif %}{% if m.tool_calls %}<|START_ACTION|>[{% for c in m.tool_calls %}"
        + '{"tool_name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}]<|END_ACTION|>'
        + "{% else %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endif %}"
        + "{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}{% endif %}"
        + "<|END_OF_TURN_TOKEN|>"
        + _DONE
        + _GEN
        + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        + _END
    ),
    "chatbot_plain": (
        "{{ bos_token }}"
        + _FOR
        + "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}_TOKEN|>{{ m.content | trim }}"
        + "<|END_OF_TURN_TOKEN|>"
        + _DONE
        + _GEN
        + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        + _END
    ),
    "end_then_eos": (
        _FOR
        + "<|{{ m.role }}|>{{ m.content }}<|end|>"
        + _DONE
        + "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    ),
    # Ends that depend on what was said.
    "channels": (
        "<|start|>system<|message|>Knowledge cutoff: 2024-06\nCurrent date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        + "{% if tools %}<|start|>developer<|message|># Tools\n{{ tools | tojson }}<|end|>{% endif %}"
        + _FOR
        + "{% if m.role == 'assistant' %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        + "{% if m.thinking or m.content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking or m.content }}<|end|>{% endif %}"
        + "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>"
        + "{% elif loop.last and not add_generation_prompt %}"
        + "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}"
        + "<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
        + "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
        + "{% else %}<|start|>{{ 'functions' if m.role == 'tool' else m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
        + _DONE
        + _GEN
        + "<|start|>assistant"
        + _END
    ),
    "observation": (
        "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
        + _FOR
        + _SPLIT
        + "{% if m.role == 'tool' %}\n<tool_response>\n{{ m.content }}\n</tool_response>{% elif m.role == 'assistant' %}<|assistant|>"
        + "\n<think>{{ think }}</think>{% if text.strip() %}\n{{ text.strip() }}{% endif %}{% if m.tool_calls %}"
        + "{% for c in m.tool_calls %}\n<tool_call>{{ c.function.name }}"
        + "{% for k, v in c.function.arguments.items() %}\n<arg_key>{{ k }}</arg_key>"
        + "\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}\n</tool_call>"
        + "{% endfor %}<|observation|>{% endif %}"
        + "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
        + _DONE
        + _GEN
        + "<|assistant|>"
        + _END
    ),
    "nothing_after": ("[gMASK]<sop>" + _FOR + "<|{{ m.role }}|>\n{{ m.content }}" + _DONE + _GEN + "<|assistant|>\n" + _END),
    "turn_channels": (
        "{{ bos_token }}{% if tools %}<|turn>system\n{% for t in tools %}<|tool>{{ t | tojson }}<tool|>{% endfor %}<turn|>\n{% endif %}"
        + _FOR
        + "{% if m.role == 'tool' %}<|tool_response>response{{ m.content }}<tool_response|>{% else %}<|turn>"
        + "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + "{% if m.reasoning_content and loop.last %}<|channel>thought\n{{ m.reasoning_content }}"
        + "\n<channel|>{% endif %}{{ m.content | trim }}{% if m.tool_calls %}"
        + "{% for c in m.tool_calls %}<|tool_call>call:{{ c.function.name }}"
        + "{{ c.function.arguments | tojson }}<tool_call|>{% endfor %}<|tool_response>{% else %}<turn|>\n{% endif %}{% endif %}"
        + _DONE
        + _GEN
        + "<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}"
        + _END
    ),
    # Turns in plain words.
    "folded_system": (
        "{{ bos_token }}"
        + _ALTERNATE
        + "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        + "{% endif %}{{ m.content | trim }}<end_of_turn>\n"
        + _DONE
        + _GEN
        + "<start_of_turn>model\n"
        + _END
    ),
    "user_colon": (
        _FOR + "{{ 'Bird' if m.role == 'assistant' else m.role | title }}: {{ m.content | trim }}\n\n" + _DONE + _GEN + "Bird:" + _END
    ),
    "upper_colon": (
        "{{ bos_token }}A chat between a user and an assistant. "
        + _FOR
        + "{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}USER: {{ m.content }} {% endif %}"
        + _DONE
        + _GEN
        + "ASSISTANT:"
        + _END
    ),
    "correct_user": (
        "{{ bos_token }}"
        + _FOR
        + "GPT4 Correct {{ m.role | title }}: {{ m.content }}<|end_of_turn|>"
        + _DONE
        + _GEN
        + "GPT4 Correct Assistant:"
        + _END
    ),
    "bar_brackets": (
        _FOR
        + "[|{{ m.role }}|]{{ m.content }}{{ '\n' if m.role == 'user' else '[|endofturn|]\n' }}"
        + _DONE
        + _GEN
        + "[|assistant|]"
        + _END
    ),
    "hashes": _FOR + "### {{ m.role | title }}:\n{{ m.content }}\n\n" + _DONE + _GEN + "### Assistant:\n" + _END,
    "hashes_eos": (
        "{{ bos_token }}"
        + _FOR
        + "### {{ m.role | title }}:\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n\n"
        + _DONE
        + _GEN
        + "### Assistant:\n"
        + _END
    ),
    # What is swallowed.
    "calls_alone": (
        _FOR
        + "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
        + _CALLS
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        + _DONE
        + _IM_GEN
    ),
    "calls_never": "{{ bos_token }}" + _FOR + "[{{ m.role }}]{{ ' ' + m.content }}{{ eos_token if m.role == 'assistant' }}[/]" + _DONE,
    "first_line_only": (_FOR + "<|im_start|>{{ m.role }}\n{{ m.content.split('\n')[0] }}<|im_end|>\n" + _DONE + _IM_GEN),
}

TOKENS = re.compile(
    r"<\|[^|><]{1,30}\|?>|<[^|<>]{1,20}\|>|<｜[^｜>]{1,30}｜>|</?(?:think|tool_call|tool_response|arg_key|arg_value)>|<[a-z_]{3,30}>|<[A-Z]+_\d+>|"
    ""
    r"\[/?(?:INST|gMASK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|ARGS|THINK)\]|\]~b\]|\[e~\[|\[\|[a-z]+\|\]"
)
"""What in a template's text is a token of its model."""

_NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response|arg_key|arg_value)>")


def trl_templates() -> dict[str, str]:
    """The templates that the installed TRL ships, by name; none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin or "").parent / "chat_templates" if spec else None
    return {f"trl/{path.stem}": path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))} if folder else {}


@cache
def all_templates() -> dict[str, str]:
    """Every template that the tests know, by name."""
    return {**STYLES, **WRITTEN, **trl_templates()}


def tokens_of(source: str) -> list[str]:
    """The special tokens that a template names."""
    return sorted({text for text in TOKENS.findall(source) if "{" not in text})


@cache
def corpus_tokenizer(name: str, kind: str = "newline_merging") -> PreTrainedTokenizerFast:
    """A small tokenizer with that template, which knows its tokens."""
    from tokenizers import AddedToken

    source = all_templates()[name]
    tokenizer = build_tokenizer(kind, source)
    names = [*tokens_of(source), *(f"<|{role}|>" for role in ("user", "assistant", "system") if "<|{{ m.role }}|>" in source)]
    tokenizer.add_tokens([AddedToken(token, special=not _NOT_SPECIAL.search(token), normalized=False) for token in names])
    return tokenizer
