"""A large file end to end: rows made, tokenised into the cache by several processes, a few steps trained; and once more from the cache.

    python benchmarks/million.py --tokenizer FOLDER [--num_rows 1000000] [--num_proc 2] [--out results.json]

The rows are real ones again and again, each with words of its own, so that no two are the same. The model is tiny: what is measured is
what a process needs beside its model. Memory is looked at four times a second, of every process of a run (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenising import answers_of_two

SOURCE = Path(__file__).parents[1] / "src"
WORDS_OF_ANSWER = 90
"""About 300 tokens of a row: prompt and two answers."""


def rows(num_rows: int) -> Iterator[dict[str, str]]:
    """Real prompts and answers, cut to a length that varies, a few words in other places."""
    source = random.Random(0)
    kinds = list(answers_of_two())
    for number in range(num_rows):
        row = kinds[number % len(kinds)]
        made = {"prompt": f"{row['prompt'][:400]} (question {number})"}
        for side in ("chosen", "rejected"):
            words = row[side].split()
            start = source.randrange(max(1, len(words) - WORDS_OF_ANSWER))
            made[side] = " ".join(words[start : start + source.randint(WORDS_OF_ANSWER // 2, 3 * WORDS_OF_ANSWER // 2)]) + f" {number}"
        yield made


def make_model(folder: Path, tokenizer: str) -> None:
    """A Llama of a few weights, with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


def tree_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for one in found:
        try:
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: its own, and of files that it has mapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    values = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if name.startswith(("Rss", "VmRSS"))
    }
    return {"own": values.get("RssAnon", 0), "files": values.get("RssFile", 0)}


def processor_s() -> float:
    """Of all processes that were waited for."""
    used = os.times()
    return used.children_user + used.children_system


def run(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One start of `orpo train`: its time, its lines, and the most memory of each of its processes."""
    begun, before = time.monotonic(), processor_s()
    peaks: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "orpo", "train", *words], env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            for pid in tree_of(process.pid):
                for name, value in memory_of(pid).items():
                    kept = peaks.setdefault(pid, {})
                    kept[name] = max(kept.get(name, 0), value)
            time.sleep(0.25)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(text)
    first, *others = peaks.values()
    return {
        "wall_s": round(time.monotonic() - begun, 1),
        "processor_s": round(processor_s() - before, 1),
        "main": first,
        "others": others,
        "lines": text.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="with its chat template")
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    parser.add_argument("--num_proc", type=int, default=2, help="processes that tokenise")
    parser.add_argument("--folder", type=Path, help="where everything is put (a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in rows(args.num_rows):
                file.write(json.dumps(row) + "\n")
        make_model(folder / "model", args.tokenizer)
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        results = {"num_rows": args.num_rows, "num_proc": args.num_proc, "file_bytes": (folder / "rows.jsonl").stat().st_size}
        for name, few in (("floor", 200), ("first", None), ("second", None)):
            words = {
                "model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": folder / f"run-{name}",
                "token_cache": folder / "cache", "dataset_num_proc": args.num_proc, "max_steps": 4, "max_length": 1024,
                "per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True, "bf16": False,
            }  # fmt: skip
            if few is not None:
                words["dataset_train_split"] = f"train[:{few}]"
            results[name] = run([text for key, value in words.items() for text in (f"--{key}", str(value))], environment)
        results["cache_bytes"] = max(path.stat().st_size for path in (folder / "cache").glob("*/groups.arrow"))
    print(json.dumps(results, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
