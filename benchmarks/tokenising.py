"""Tokenising of whole sources, held to what the `tokenizers` library takes for the same texts alone.

    python benchmarks/tokenising.py --tokenizer FOLDER [--tokenizer FOLDER …] [--rounds 5] [--out results.json]

"Alone" is prompt + chosen and prompt + rejected of every row, rendered before the clock starts, through `encode_batch_fast`: nothing is
read, judged, joined, counted or kept. "orpo" is what a run does: the file is read, rows are judged, rendered, tokenised, proved, counted
and kept, in memory or in the token cache. Both are timed in turn, in processor time of all processes of theirs, so that whoever else uses
the machine changes little; one thread each. Two processes are held to the library in two processes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[2] / "shared")) / "data"
BATCH_TEXTS = 512


def answers_of_two() -> Iterator[dict[str, Any]]:
    """AlpacaEval's prompts, answered by two models: single turns, long answers, as in UltraFeedback."""
    models = [json.loads((SHARED / "paper_outputs" / f"Mistral-ORPO-{name}.json").read_text()) for name in ("beta", "alpha")]
    for chosen, rejected in zip(*models, strict=True):
        yield {"prompt": chosen["instruction"], "chosen": chosen["output"], "rejected": rejected["output"]}


def conversations() -> Iterator[dict[str, Any]]:
    """Several turns, long prompts."""
    yield from json.loads((SHARED / "sharegpt_demo" / "dpo_en_demo.json").read_text())


def transcripts() -> Iterator[dict[str, Any]]:
    """Several turns, short answers."""
    with gzip.open(SHARED / "hh_harmless" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


ROWS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "single turns": answers_of_two,
    "conversations": conversations,
    "hh": transcripts,
}


def write_rows(name: str, path: Path, num_rows: int) -> None:
    """So many rows of a set, one a line; those that come again say which time it is."""
    rows = list(ROWS[name]())
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            text = json.dumps(rows[number % len(rows)])
            file.write(text.replace('." ', f'. {number}" ') + "\n")


def load(folder: str) -> Any:
    """A tokenizer with its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def settings() -> Any:
    """A configuration's own, but for a length that no row exceeds by much."""
    from orpo.data.settings import DataSettings
    from orpo.run.config import resolve

    values = resolve(None, ["--model_name_or_path", "any", "--dataset_name", "any", "--max_length", "4096"]).values
    return DataSettings.of(values)


def make_encoder(folder: str) -> Any:
    from orpo.data.template import make_encoder as made

    return made(load(folder), settings())


def full_texts(path: Path, folder: str) -> list[str]:
    """What "alone" tokenises: prompt and answer together, of both answers of every row that is used."""
    from orpo.data.formats import stream_preferences
    from orpo.data.types import Preference

    encoder = make_encoder(folder)
    drafts = [encoder._draft(row) for row in stream_preferences(str(path)) if isinstance(row, Preference)]
    return [text for draft in drafts if hasattr(draft, "full_texts") for text in draft.full_texts]


def spent_s() -> float:
    """Processor time of this process and of those that it has waited for."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Processor seconds of all, and of this process alone."""
    whole, own = spent_s(), time.process_time()
    work()
    return spent_s() - whole, time.process_time() - own


def alone(texts: list[str], folder: str) -> Callable[[], None]:
    """The library's work."""
    backend = load(folder).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def run() -> None:
        for start in range(0, len(texts), BATCH_TEXTS):
            for encoding in backend.encode_batch_fast(texts[start : start + BATCH_TEXTS], add_special_tokens=False):
                encoding.ids  # noqa: B018  a list is made of them, as everybody needs one

    return run


def whole(path: Path, folder: str, num_processes: int, is_cached: bool) -> Callable[[], None]:
    """A run's work."""
    from orpo.data.formats import stream_preferences
    from orpo.data.stored.tokenise import Means, tokenise_source

    encoder = make_encoder(folder)

    def run() -> None:
        with tempfile.TemporaryDirectory() as cache:
            tokenise_source(
                lambda: stream_preferences(str(path), is_again=True),
                encoder,
                spec=str(path),
                split=None,
                settings=settings(),
                means=Means(num_processes, cache if is_cached else None, rows_alone=0 if num_processes > 1 else 2048),
            )

    return run


def halves(texts: list[str], folder: str) -> Callable[[], None]:
    """The library's work in two processes at the same time, each one half: they share caches and memory with each other."""
    works = [alone(texts[start::2], folder) for start in range(2)]

    def run() -> None:
        started = []
        for work in works:
            if (child := os.fork()) == 0:
                work()
                os._exit(0)
            started.append(child)
        for child in started:
            os.waitpid(child, 0)

    return run


CASES = {"in memory": (1, False), "into the cache": (1, True), "into the cache, 2 processes": (2, True)}


def measure(name: str, folder: str, num_rows: int, num_rounds: int, cases: list[str]) -> list[dict[str, Any]]:
    """All cases of a set of rows and a tokenizer, in turn."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        write_rows(name, path, num_rows)
        texts = full_texts(path, folder)
        works = {"alone": alone(texts, folder), **{case: whole(path, folder, *CASES[case]) for case in cases}}
        two = [case for case in cases if CASES[case][0] == 2]
        if two:
            works["alone, 2 processes"] = halves(texts, folder)
        spent: dict[str, list[float]] = {case: [] for case in works}
        parents: dict[str, list[float]] = {case: [] for case in works}
        for work in works.values():
            work()
        for _ in range(num_rounds):
            for case, work in works.items():
                of_all, of_parent = timed(work)
                spent[case].append(of_all)
                parents[case].append(of_parent)
    base = {case: spent["alone, 2 processes" if case in two else "alone"] for case in cases}
    return [
        {
            "rows": name,
            "num_rows": len(texts) // 2,
            "num_chars": sum(map(len, texts)),
            "tokenizer": Path(folder).name,
            "case": case,
            "alone_s": base[case],
            "orpo_s": spent[case],
            "parent_s": parents[case],
            "share": statistics.median(other / own for other, own in zip(base[case], spent[case], strict=True)),
            "alone_rows_per_s": len(texts) / 2 / statistics.median(base[case]),
            "rows_per_s": len(texts) / 2 / statistics.median(spent[case]),
            "parent_share": statistics.median(parents[case]) / statistics.median(spent[case]),
        }
        for case in cases
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| rows | tokenizer | case | alone, rows/s | orpo, rows/s | share | per round (min–max) | the reading process's part |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        shares = [other / own for other, own in zip(result["alone_s"], result["orpo_s"], strict=True)]
        speeds = f"{result['alone_rows_per_s']:,.0f} | {result['rows_per_s']:,.0f}"
        spread = f"{min(shares):.0%}–{max(shares):.0%}"
        lines.append(
            f"| {result['rows']} | {result['tokenizer']} | {result['case']} | {speeds} "
            f"| {result['share']:.0%} | {spread} | {result['parent_share']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", action="append", required=True, metavar="FOLDER", help="with its chat template; repeatable")
    parser.add_argument("--rows", action="append", choices=list(ROWS), help="which rows; all, if not given")
    parser.add_argument("--case", action="append", choices=list(CASES), help="which cases; all, if not given")
    parser.add_argument("--num_rows", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    results = [
        result
        for folder in args.tokenizer
        for name in args.rows or ROWS
        for result in measure(name, folder, args.num_rows, args.rounds, args.case or list(CASES))
    ]
    print(table(results))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
