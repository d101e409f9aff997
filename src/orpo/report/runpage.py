"""The report of one run: which sections it has, and what stands at its head."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from orpo.data.types import NOTES, REASONS
from orpo.report.curves import curve_section
from orpo.report.evaluations import Record, answer_section, pair_section, pairs_of, result_sections
from orpo.report.facts import RunFacts
from orpo.report.sections import (
    Cell,
    Page,
    Row,
    Section,
    Table,
    excludes_zero,
    human_count,
    human_seconds,
    items,
    number,
    part,
    parts,
    show,
    text,
)
from orpo.report.tokens import token_section
from orpo.system.redact import redact_words

_TONES = {"complete": "good", "running": "open", "stopped": "bad", "failed": "bad", "unknown": "open"}
_GIGA = 1e9


def run_page(facts: RunFacts, beside: Mapping[str, Mapping[str, Record]] | None = None) -> Page:
    """The whole page of a run."""
    page = Page(facts.folder.resolve().name, "run", facts.status, _TONES.get(facts.status, "open"), [what_was_trained(facts)])
    page.counts = _counts(facts)
    page.notes = facts.notes
    page.sections = [
        setup_section(facts),
        pair_section(facts.results, facts.demo),
        curve_section(facts),
        answer_section(facts.results, facts.demo),
        token_section(facts.results.get("pairs")),
        *result_sections(facts.results, beside),
        data_section(facts),
        cost_section(facts),
        environment_section(facts.run, facts.folder.name, given=facts.given, everything=facts.configuration, command=command_of(facts)),
    ]
    return page


def what_was_trained(facts: RunFacts) -> str:
    """One sentence: model, method, pairs, source, steps, end."""
    model = short_name(facts.configuration.get("model_name_or_path") or part(facts.run, "model", "name"))
    if not model:
        return "What was trained on what is not known: run.json is missing or damaged."
    count, unit = trained_on(facts.run)
    sources = ", ".join(source_names(facts.configuration.get("dataset_name")))
    said = f"{model}, tuned with {facts.method} on {human_count(count)} preference {unit}" + (f" of {sources}" if sources else "")
    done = number(facts.run.get("last_step"))
    steps = number(facts.run.get("num_steps"))
    if done is not None and facts.status == "complete":
        said += f", {done:.0f} steps"
    elif steps is not None:
        said += f", {steps:.0f} steps planned"
    ended = number(facts.run.get("ended_unix_s"))
    return said + (f"; ended {when(ended)}." if ended is not None else ".")


def trained_on(run: Mapping[str, Any]) -> tuple[float | None, str]:
    """How much was trained on, and of what: pairs, or rows where a share of rows with several pairs each was held out of them."""
    train = parts(run, "data", "train")
    pairs, rows = number(train.get("num_pairs")), number(train.get("num_groups"))
    held_out = number(part(run, "data", "num_held_out"))
    if not held_out or parts(run, "data", "held_out") or rows is None:
        return pairs, "pairs"
    return rows - held_out, "pairs" if rows == pairs else "rows"


def short_name(value: Any) -> str:
    """A hub id as it is; of a path the last part alone."""
    name = text(value).rstrip("/\\")
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return name.replace("\\", "/").rpartition("/")[2] if is_path else name


def source_names(value: Any) -> list[str]:
    """Names of data sets or files, without their folders."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [name for name in map(short_name, values) if name]


def when(unix_s: float) -> str:
    """`2026-11-24 10:15 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(unix_s, 0.0), 4e11)))


def _counts(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The numbers to see first: (number, what it is, tone)."""
    before, after, change, _ = pairs_of(facts.results, facts.demo)
    counts = []
    for key, words, style in (("accuracy", "held-out accuracy", ".1%"), ("margin", "margin, nats per token", "+.2f")):
        new, old = number(part(after, key, "value")), number(part(before, key, "value"))
        if new is not None:
            told = show(new, style) if old is None else f"{show(old, style).partition(' ')[0]} → {show(new, style)}"
            counts.append((told, words, {1: "good", -1: "bad"}.get(excludes_zero(change.get(key)), "")))
    logs = facts.logs
    last = logs.training[-1] if logs.training else {}
    if not counts and number(last.get("loss")) is not None:
        counts.append((show(last["loss"]), "last logged loss", ""))
    done = facts.run.get("last_step", last.get("step"))
    if number(done) is not None:
        steps = number(facts.run.get("num_steps"))
        counts.append((f"{done:.0f}" + (f" of {steps:.0f}" if steps is not None else ""), "optimizer steps", ""))
    count, unit = trained_on(facts.run)
    if count is not None:
        counts.append((human_count(count), f"{unit} trained on", ""))
    runtime = number(logs.end.get("train_runtime"))
    if runtime is not None:
        counts.append((human_seconds(runtime), "training time", ""))
    return counts


def setup_section(facts: RunFacts) -> Section:
    """What was trained on what."""
    section = Section("setup", "What was trained on what", short="Setup")
    run, options = facts.run, facts.configuration
    model = parts(run, "model")
    if model:
        quantized = f", {text(model['quantization'])}" if text(model.get("quantization")) else ""
        told = f"{short_name(model.get('name'))}: {text(model.get('architecture'))}, {human_count(model.get('num_parameters'))} parameters"
        section.facts.append(("model", f"{told}, {text(model.get('dtype'))}{quantized}"))
    if options:
        rank = f"LoRA, rank {text(options.get('lora_r'))}, alpha {text(options.get('lora_alpha'))}"
        section.facts.append(("trained weights", rank if options.get("use_peft") else "all of them"))
        section.facts.append(("objective", text(facts.objective.get("formula"), "?")))
        rows = (
            number(options.get("per_device_train_batch_size")),
            number(options.get("gradient_accumulation_steps")),
            number(run.get("world_size")),
        )
        step = 1
        for factor in rows:
            step *= int(factor or 1)
        told = f"{human_count(run.get('num_steps'))} steps of {step} rows, learning rate {text(options.get('learning_rate'))}"
        section.facts.append(("schedule", f"{told} ({text(options.get('lr_scheduler_type'), 'linear')}), seed {text(run.get('seed'))}"))
    data = parts(run, "data")
    if data:
        train = parts(data, "train")
        pairs, used, read = (human_count(train.get(key)) for key in ("num_pairs", "num_groups", "num_rows"))
        told = f"{pairs} pairs in {used} of {read} rows"
        sources = ", ".join(source_names(options.get("dataset_name"))) or "unknown source"
        section.facts.append(("data", f"{sources}: {told}; {human_count(data.get('num_held_out'))} rows held out"))
    if text(run.get("engine")):
        section.facts.append(("computed by", f"the {text(run['engine'])} engine in {text(run.get('compute_dtype'))} on {_device(run)}"))
    return section


def _device(run: Mapping[str, Any]) -> str:
    device = parts(run, "device")
    if text(device.get("name")):
        return f"{text(device['name'])} ({human_count((number(device.get('memory_bytes')) or 0) / _GIGA)} GB)"
    threads = text(device.get("threads"))
    return text(device.get("type"), "?") + (f", {threads} threads" if threads else "")


def data_section(facts: RunFacts) -> Section:
    """Rows, what was dropped and altered and why, lengths, template."""
    section = Section("data", "Data")
    for name, title in (("train", "training rows"), ("held_out", "held-out rows")):
        report = parts(facts.run, "data", name)
        if not report:
            continue
        read, used, pairs = (human_count(report.get(key)) for key in ("num_rows", "num_groups", "num_pairs"))
        told = f"{read} read, {used} used, {pairs} pairs"
        for key, words in (("num_sft_only", "for the next-token loss alone"), ("num_duplicates", "duplicates")):
            if number(report.get(key)):
                told += f", {human_count(report[key])} {words}"
        section.facts.append((title, told))
        section.tables += [
            table for table in (_reason_table(report, "dropped", title, REASONS), _reason_table(report, "notes", title, NOTES)) if table
        ]
    lengths = _lengths(facts.run)
    if lengths is not None:
        section.tables.append(lengths)
    template = parts(facts.run, "data", "template")
    if template:
        told = f"{text(template.get('template'), 'none')}, answers end with {text(template.get('terminator'), '?')}"
        limit = f"max_length {text(template.get('max_length'), 'none')}, truncation {text(template.get('truncation'), '?')}"
        section.facts += [("template", told), ("lengths", limit)]
    if text(part(facts.run, "data", "fingerprint")):
        section.facts.append(("fingerprint", text(part(facts.run, "data", "fingerprint"))))
    if section.facts and not any(table.title.startswith("Dropped") for table in section.tables):
        section.lead.append("No row was dropped.")
    return section


def _reason_table(report: Mapping[str, Any], kind: str, title: str, words: Mapping[str, str]) -> Table | None:
    counts = {code: count for code, count in parts(report, kind).items() if number(count)}
    if not counts:
        return None
    total = number(report.get("num_rows")) or 0
    rows: list[Row] = []
    for code, count in sorted(counts.items(), key=lambda item: -item[1]):
        places = [
            text(example[0] if isinstance(example, (list, tuple)) and example else example) for example in items(report, "examples", code)
        ]
        named = ", ".join(place.replace("\\", "/").rpartition("/")[2] for place in places[:3] if place)
        share = show(count / total, ".1%") if total else "–"
        rows.append([Cell(code), words.get(code, ""), named, human_count(count), share])
    verb = "Dropped" if kind == "dropped" else "Altered or remarkable"
    return Table(("reason", "what it means", "for example", "rows", "share"), rows, title=f"{verb}: {title}", num_texts=3)


def _lengths(run: Mapping[str, Any]) -> Table | None:
    keys = ("mean", "p50", "p90", "p99", "max")
    rows: list[Row] = []
    for name, title in (("train", "training"), ("held_out", "held out")):
        for what, measured in parts(run, "data", name, "lengths").items():
            rows.append([Cell(f"{title}: {what}"), *(show(part(measured, key), ",.0f") for key in keys)])
    return Table(("tokens", "mean", "median", "90 %", "99 %", "longest"), rows, title="Lengths in tokens") if rows else None


def cost_section(facts: RunFacts) -> Section:
    """Time, throughput, computation."""
    section = Section("cost", "Cost")
    logs, rows = facts.logs, []
    runtime = number(logs.end.get("train_runtime"))
    rows.append(("training time, evaluations inside", human_seconds(runtime) if runtime is not None else ""))
    for key, words in (("tokens_per_second", "tokens per second, median"), ("pairs_per_second", "pairs per second, median")):
        _, values = logs.series(key)
        rows.append((words, show(median(values), ",.1f") if values else ""))
    rows.append(
        (
            "floating-point operations (transformers' estimate)",
            human_count(logs.end["total_flos"]) if number(logs.end.get("total_flos")) else "",
        )
    )
    starts = len(items(facts.run, "starts"))
    rows.append(("started", f"{starts} times" if starts > 1 else ""))
    for task, record in facts.results.items():
        rows.append((f"orpo eval, {task}", human_seconds(record.get("wall_s")) if number(record.get("wall_s")) is not None else ""))
    weights = next((folder for folder in (facts.folder / "model", facts.folder / "adapter") if folder.is_dir()), None)
    if weights is not None:
        size = sum(file.stat().st_size for file in weights.iterdir() if file.is_file())
        rows.append((f"final weights on disk ({weights.name})", f"{size / 1e6:,.1f} MB"))
    shown: list[Row] = [[Cell(words), value] for words, value in rows if value]
    if shown:
        section.tables.append(Table(("", ""), shown))
    return section


def command_of(facts: RunFacts) -> str:
    """The command line that started the run, without secrets; empty where it was started from Python."""
    starts = items(facts.run, "starts")
    words = [text(word) for word in items(starts[-1], "argv")] if starts else []
    if not words or words[0] != facts.run.get("command"):
        return ""
    return f"orpo {shlex.join(redact_words(words))}"


def environment_section(
    run: Mapping[str, Any], name: str, *, given: Mapping[str, Any], everything: Mapping[str, Any], command: str
) -> Section:
    """How to reproduce: command, configuration as YAML, versions, device, seed, fingerprints."""
    section = Section("environment", "Environment, and how to reproduce this", short="Reproduce")
    versions = {str(key): text(value) for key, value in parts(run, "versions").items()}
    if versions:
        section.facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items() if key != "platform")))
        section.facts.append(("platform", versions.get("platform", "?")))
    if parts(run, "device"):
        section.facts.append(("device", ", ".join(f"{key} {text(value)}" for key, value in parts(run, "device").items() if text(value))))
    for key, words in (("seed", "seed"), ("starting_weights_sha256", "starting weights, sha256")):
        if text(run.get(key)):
            section.facts.append((words, text(run[key])))
    if text(part(run, "data", "fingerprint")):
        section.facts.append(("data fingerprint", text(part(run, "data", "fingerprint"))))
    if command:
        section.codes.append(("Command", command, False))
    if given:
        section.codes.append((f"{name}.yaml: what was set", as_yaml(given), False))
    if everything:
        section.codes.append(("Every option with its value", as_yaml(everything), True))
    return section


def as_yaml(values: Mapping[str, Any]) -> str:
    """Options as YAML that `orpo train` reads."""
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=True, allow_unicode=True, width=120)
