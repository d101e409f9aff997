"""The model card (README.md of a run), from the same facts as the report, with the hub's own classes.

It may be pushed with the weights, so it holds counts and results only: no rows, no answers, no secrets, and of local paths only last parts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from orpo.report.evaluations import METRICS, pairs_of, verdict
from orpo.report.facts import RESULTS, RunFacts, read_run
from orpo.report.runpage import as_yaml, setup_section, short_name, source_names, what_was_trained
from orpo.report.sections import Cell, estimate, human_count, items, number, part, parts, text
from orpo.report.shown import style_of
from orpo.system.files import write_atomically
from orpo.system.redact import redact

CARD_FILE = "README.md"
MARK = "<!-- Written by orpo. A card without this line is left as it is. -->"

_PRIVATE_KEYS = ("hub_", "output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "report_to", "push_to_hub")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NAME = re.compile(r"[A-Za-z0-9][\w./-]*")
_DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".txt")


def write_card(source: RunFacts | str | Path) -> Path | None:
    """Write a run's card; None where somebody else's README.md is in its place.

    Args:
        source: the run's facts, or its folder.

    Raises:
        OSError: the file cannot be written.
    """
    facts = source if isinstance(source, RunFacts) else read_run(Path(source))
    path = facts.folder / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    write_atomically(path, card_text(facts).encode("utf-8", "replace"))
    return path


def card_text(facts: RunFacts) -> str:
    """The card: metadata as YAML, then Markdown."""
    from huggingface_hub import ModelCard

    body = "\n\n".join(part for part in _body(facts) if part)
    return str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n"))


def _metadata(facts: RunFacts) -> Any:
    """The hub's metadata. What is not known is left out; a licence is the base model's, where its own card gives one."""
    from huggingface_hub import ModelCardData

    is_adapter = bool(facts.configuration.get("use_peft"))
    scores = _eval_results(facts)
    base, licence = _base(facts)
    return ModelCardData(
        base_model=base,
        license=licence,
        datasets=[name for name in _sources(facts) if _is_hub_data(name)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[facts.method.lower(), "preference-optimization", *(["lora"] if is_adapter else [])],
        model_name=_name(facts) if scores else None,
        eval_results=scores or None,
    )


def _name(facts: RunFacts) -> str:
    return facts.folder.resolve().name


def _sources(facts: RunFacts) -> list[str]:
    value = facts.configuration.get("dataset_name")
    return [text(one) for one in (value if isinstance(value, (list, tuple)) else [value]) if text(one)]


def _is_hub_data(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_DATA_FILES) and not Path(name).exists()


def _base(facts: RunFacts) -> tuple[str | None, str | None]:
    """Hub id of the starting weights and their licence, where they are known: by the hub's cache, or by the card beside a local model."""
    from huggingface_hub import try_to_load_from_cache

    from orpo.models.bundled import BUNDLED_HUB_ID, BUNDLED_LICENCE

    kind, location = text(part(facts.run, "model", "kind")), text(part(facts.run, "model", "location"))
    if kind == "alias":
        return BUNDLED_HUB_ID, BUNDLED_LICENCE
    if kind == "hub" and _HUB_ID.fullmatch(location):
        cached = try_to_load_from_cache(location, CARD_FILE, revision=text(part(facts.run, "model", "revision")) or None)
        return location, _card_of(cached).get("license") if isinstance(cached, str) else None
    beside = _card_of(Path(location) / CARD_FILE) if location else {}
    return beside.get("base_model"), beside.get("license")


def _card_of(path: str | Path) -> dict[str, str]:
    """Base model and licence of another model's card; empty where it cannot be read or they are no plain names."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in ("base_model", "license") if isinstance(data.get(key), str) and _NAME.fullmatch(data[key])}


def _eval_results(facts: RunFacts) -> list[Any]:
    """Scores for the hub's model index."""
    from huggingface_hub import EvalResult

    _, after, _, _ = pairs_of(facts.results, facts.demo)
    pairs = ("preference-pairs", f"held-out pairs of {', '.join(source_names(facts.configuration.get('dataset_name'))) or 'the data'}")
    wanted = [
        (*pairs, "accuracy", "chosen answer preferred", part(after, "accuracy", "value")),
        (*pairs, "margin", "margin, nats per token", part(after, "margin", "value")),
    ]
    for key in ("prompt_strict", "instruction_strict"):
        value = part(facts.results.get("ifeval"), "result", key, "value")
        wanted.append(("google/IFEval", "IFEval", key, key.replace("_", " "), value))
    wanted.append(("mt_bench", "MT-Bench", "score", "score, 1 to 10", part(facts.results.get("mtbench"), "result", "score", "value")))
    rate = part(facts.results.get("alpacaeval"), "result", "win_rate", "value")
    wanted.append(("tatsu-lab/alpaca_eval", "AlpacaEval", "win_rate", "win rate", rate))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            metric_type=metric,
            metric_name=words,
            metric_value=round(value, 4),
        )
        for kind, name, metric, words, value in wanted
        if number(value) is not None
    ]


def _body(facts: RunFacts) -> list[str]:
    return [
        MARK,
        f"# {escape(_name(facts))}",
        escape(what_was_trained(facts)),
        _method(facts),
        _unfinished(facts),
        "## Setup\n\n" + _table(("", ""), setup_section(facts).facts),
        _results(facts),
        _data(facts),
        _new_tokens(facts),
        _use(facts),
        _options(facts),
        _versions(facts),
        _limits(facts),
    ]


def _limits(facts: RunFacts) -> str:
    said = (
        "The results above are on the data named there and say nothing about other data."
        if _results(facts)
        else "Nothing was measured on rows that were held out; `orpo eval` measures a run."
    )
    return (
        f"## Limits\n\n{said} Preference tuning changes style more surely than knowledge; what the model writes may be wrong. "
        "The licences of the base model and of the data apply."
    )


def _method(facts: RunFacts) -> str:
    """What was optimised, with a link to its source. Of a plugin's objective this is the plugin's text, and escaped like any other."""
    about, source = text(facts.objective.get("about")), text(facts.objective.get("source"))
    name = escape(facts.method)
    linked = f"[{name}]({source})" if re.fullmatch(r"https://[\w./-]+", source) else name
    said = f"Trained with {linked}" + (f": {escape(about)}." if about else ".")
    return said + (" A stage of a comparison of methods." if facts.run.get("command") == "compare" else "")


def _unfinished(facts: RunFacts) -> str:
    return "" if facts.status == "complete" else f"**The run is not complete: {escape(facts.status)}.**"


def _results(facts: RunFacts) -> str:
    before, after, change, source = pairs_of(facts.results, facts.demo)
    blocks = []
    if after:
        rows = []
        for key, words, style, _ in METRICS:
            if key in after and key != "log_odds_accuracy":
                signed = "+.1%p" if "%" in style else style
                values = [estimate(one.get(key), how) for one, how in ((before, style), (after, style), (change, signed))]
                rows.append((words, *map(_plain, values)))
        count, where = text(after.get("num_pairs"), "?"), escape(short_name(source))
        said = f"{count} pairs that were not trained on ({where}); 95 % bootstrap intervals over prompts."
        blocks.append(said + (f" {verdict(change).text}" if change else "") + "\n\n" + _table(("", "before", "after", "change"), rows))
    elif last := _last_evaluation(facts):
        where = escape(", ".join(source_names(facts.configuration.get("dataset_name"))) or "the data")
        said = f"The run's own last evaluation, at step {human_count(last['step'])}, on rows of {where} that were not trained on."
        blocks.append(
            said + "\n\n" + _table(("", "after"), [(words, format(last[key], style)) for key, words, style in _HELD_OUT if key in last])
        )
    others = [(words, _plain(estimate(value, style))) for words, value, style in _other_scores(facts)]
    if others:
        blocks.append(_table(("other evaluations", "result"), others))
    return "## Results\n\n" + "\n\n".join(blocks) if blocks else ""


_HELD_OUT = (
    ("eval_loss", "loss", ".3f"),
    ("eval_nll_loss", "next-token loss, nats per token", ".3f"),
    ("eval_rewards/accuracies", "chosen answer preferred", ".1%"),
    ("eval_logps/chosen", "log-probability of chosen, nats per token", "+.3f"),
    ("eval_logps/rejected", "log-probability of rejected, nats per token", "+.3f"),
)
"""Logged name, words, style: what an evaluation in training measures."""


def _last_evaluation(facts: RunFacts) -> dict[str, float]:
    """The last evaluation of the run on its held-out rows; empty where there was none."""
    for record in reversed(facts.logs.evaluation):
        found = {key: number(record.get(key)) for key in ("step", *(key for key, _, _ in _HELD_OUT))}
        if found["step"] is not None and found["eval_loss"] is not None:
            return {key: value for key, value in found.items() if value is not None}
    return {}


def _other_scores(facts: RunFacts) -> list[tuple[str, Any, str]]:
    found = {task: parts(record, "result") for task, record in facts.results.items()}
    wanted = [
        (f"IFEval, {key.replace('_', ' ')}", part(found.get("ifeval"), key), ".1%")
        for key in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    ]
    wanted += [
        ("MT-Bench, 1 to 10", part(found.get("mtbench"), "score"), ".2f"),
        ("AlpacaEval, win rate", part(found.get("alpacaeval"), "win_rate"), ".1%"),
        ("own prompts, win rate", part(found.get("custom"), "win_rate"), ".1%"),
        ("neutral text, change in nats per token", part(found.get("retention"), "change", "nll"), "+.3f"),
    ]
    for task, record in facts.results.items():
        if task not in RESULTS:  # a task that this package does not bring
            scores = [
                (text(part(one, "name")), part(one, "value"), style_of(part(one, "style"))) for one in items(record, "show", "scores")
            ]
            wanted += [
                (f"{task}, {name}", value if isinstance(value, Mapping) else {"value": value}, style) for name, value, style in scores
            ]
    return [(words, value, style) for words, value, style in wanted if number(part(value, "value")) is not None]


def _data(facts: RunFacts) -> str:
    """Counts, never rows."""
    train = parts(facts.run, "data", "train")
    if not train:
        return ""
    rows = [
        (words, human_count(train.get(key)))
        for key, words in (("num_rows", "rows read"), ("num_groups", "rows used"), ("num_pairs", "pairs"))
    ]
    rows += [(f"dropped: {code}", human_count(count)) for code, count in parts(train, "dropped").items() if number(count)]
    rows.append(("held out", human_count(part(facts.run, "data", "num_held_out"))))
    return "## Data\n\n" + _table(("", "rows"), rows)


def _new_tokens(facts: RunFacts) -> str:
    """What of the vocabulary is not the base model's: a program that takes its tokenizer or its embeddings would not know it."""
    names = [text(name) for name in items(facts.run, "data", "template", "new_tokens")]
    if not names:
        return ""
    kept = "the adapter holds their rows" if facts.configuration.get("use_peft") else "the embeddings have rows for them"
    listed = ", ".join(escape(name) for name in names)
    end = text(part(facts.run, "data", "template", "terminator"))
    ending = f" An answer ends with {escape(end)}." if end in names else ""
    return (
        f"## New tokens\n\nThe chat template brought tokens that the base model does not have; their embeddings come from this training: "
        f"{listed}. Where the base had no room for them its embeddings were resized; {kept}. Use the tokenizer of this folder, not that of "
        f"the base.{ending}"
    )


def _use(facts: RunFacts) -> str:
    auto, folder = ("AutoPeftModelForCausalLM", "adapter") if facts.configuration.get("use_peft") else ("AutoModelForCausalLM", "model")
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if folder == "adapter":
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    code = f"""{imports}

model = {auto}.from_pretrained("{folder}")  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained("{folder}")

messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))"""
    return "## Use\n\n" + _fenced(code, "python")


def _options(facts: RunFacts) -> str:
    shown = {key: _without_paths(value) for key, value in facts.given.items() if not key.startswith(_PRIVATE_KEYS)}
    return "## Training options that were set\n\n" + _fenced(as_yaml(redact(shown)).rstrip(), "yaml") if shown else ""


def _without_paths(value: Any) -> Any:
    """The same value; of a local path its last part alone."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or "\\" in value or value.count("/") > 1)
    return PurePosixPath(value.replace("\\", "/")).name if is_path else value


def _versions(facts: RunFacts) -> str:
    rows = [(str(name), text(value)) for name, value in parts(facts.run, "versions").items()]
    for key, words in (("seed", "seed"), ("starting_weights_sha256", "sha256 of the starting weights")):
        rows += [(words, text(facts.run[key]))] if text(facts.run.get(key)) else []
    fingerprint = text(part(facts.run, "data", "fingerprint"))
    rows += [("fingerprint of the data", fingerprint)] if fingerprint else []
    return "## Versions\n\n" + _table(("", ""), rows) if rows else ""


def _plain(cell: Cell) -> str:
    return f"{cell.text} [{cell.detail}]" if cell.detail else cell.text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([escape(one) for one in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(words: str) -> str:
    """Text that Markdown and HTML take as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(words.split()), quote=False))


def _fenced(code: str, language: str) -> str:
    """A block of code that nothing inside it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"
