"""Eight samples of each prompt: this package's sampler beside transformers' `generate`, in turns: speed.py [REPEATS] > results/speed.json

Four ways, on SmolLM2-135M-Instruct and the same prompts, temperature and most tokens: ours (bfloat16 where that is fast, as `orpo pairs`),
`generate` with all prompts in one batch in bfloat16, the same in float32, and prompt by prompt in float32 with
`num_return_sequences=8`, as scripts have it. Seconds of wall clock and of the processor, which other processes do not stretch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from orpo.inference.generate import generate
from orpo.inference.ready import Loading, Subject, load_subject
from orpo.system.machine import versions

NUM_SAMPLES, MAX_NEW_TOKENS, TEMPERATURE = 8, 48, 0.8
STORY = "The boat left the harbour before sunrise, and nobody on the pier knew where it was going. "
QUESTIONS = (
    "What is the sea like?",
    "Who was on the boat?",
    "Where did it go?",
    "What did the people on the pier say to each other?",
    "How does the story end?",
    "Give the story a title.",
    "Is it a sad story?",
    "What would you have done?",
)
LENGTHS = {"short": 1, "long": 16}
"""Prompts of about 60 and of about 350 tokens."""


def prompts(length: str) -> list[str]:
    """One for each question."""
    return [f"{STORY * LENGTHS[length]}\n\n{question}" for question in QUESTIONS]


def ours(subject: Subject, texts: list[str]) -> int:
    """Tokens that were sampled."""
    flat = [text for text in texts for _ in range(NUM_SAMPLES)]
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, "compute_dtype": subject.compute_dtype}
    answers = generate(subject.model, subject.tokenizer, subject.encoder, flat, **options)
    return sum(answer.num_tokens for answer in answers)


def theirs(subject: Subject, model: Any, texts: list[str]) -> int:
    """The same by transformers, all texts in one batch."""
    ids = [torch.from_numpy(subject.encoder.prompt_ids(text)).long() for text in texts]
    width = max(map(len, ids))
    stops = list(subject.encoder.terminator_ids)
    inputs = torch.full((len(ids), width), stops[0])
    mask = torch.zeros_like(inputs)
    for row, one in enumerate(ids):
        inputs[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    with torch.no_grad():
        found = model.generate(
            input_ids=inputs, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, num_return_sequences=NUM_SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS, eos_token_id=stops, pad_token_id=stops[0],
        )  # fmt: skip
    new = found[:, width:]
    ended = torch.isin(new, torch.tensor(stops)).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def timed(work: Callable[[], int]) -> dict[str, float]:
    """What it takes."""
    began = time.perf_counter(), time.process_time()
    num_tokens = work()
    return {"tokens": num_tokens, "wall_s": time.perf_counter() - began[0], "cpu_s": time.process_time() - began[1]}


def main(repeats: int) -> None:
    """Print everything as JSON."""
    torch.set_num_threads(2)
    subject = load_subject("smollm2-135m-instruct", Loading(device="cpu"))
    single = load_subject("smollm2-135m-instruct", Loading(device="cpu")).model
    half = load_subject("smollm2-135m-instruct", Loading(device="cpu")).model.to(torch.bfloat16)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for length in LENGTHS:
        texts = prompts(length)
        ways: dict[str, Callable[[], int]] = {
            "ours": lambda texts=texts: ours(subject, texts),
            "generate, one batch, bfloat16": lambda texts=texts: theirs(subject, half, texts),
            "generate, one batch, float32": lambda texts=texts: theirs(subject, single, texts),
            "generate, prompt by prompt, float32": lambda texts=texts: sum(theirs(subject, single, [text]) for text in texts),
        }
        ours(subject, texts[:1])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, work in ways.items():
                runs[name].append(timed(work))
                print(length, name, runs[name][-1], file=sys.stderr, flush=True)
        found[length] = runs
    facts = {"num_samples": NUM_SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "threads": 2, "versions": versions(), "runs": found}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
