"""The prompts of the on-policy benchmark, written for it, and the programs that check answers: tasks.py FOLDER writes the prompts there.

`list`: follow an output format, a numbered list of exactly three lines. Topics of held-out prompts occur in no training prompt.
`sum`: small arithmetic in words. No held-out pair of numbers occurs in a training prompt.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path

TOPICS = [
    "fruits",
    "colours",
    "cities in Europe",
    "sports",
    "musical instruments",
    "wild animals",
    "farm animals",
    "birds",
    "trees",
    "flowers",
    "vegetables",
    "drinks",
    "desserts",
    "kinds of cheese",
    "kitchen tools",
    "garden tools",
    "school subjects",
    "languages",
    "countries in Asia",
    "countries in Africa",
    "rivers",
    "mountains",
    "planets",
    "metals",
    "materials for building",
    "pieces of furniture",
    "clothes for winter",
    "things to take to the beach",
    "board games",
    "card games",
    "kinds of weather",
    "seasons of the year",
    "days of the week",
    "months of the year",
    "parts of a car",
    "parts of the body",
    "jobs in a hospital",
    "jobs in a restaurant",
    "ways to travel",
    "kinds of boats",
    "insects",
    "fish",
    "spices",
    "breakfast foods",
    "ice cream flavours",
    "rooms in a house",
    "things in an office",
    "famous inventions",
    "holidays",
    "hobbies",
]
WORDINGS = (
    "Name three {topic}. Answer with a numbered list of exactly three lines and nothing else.",
    "Give me a numbered list of three {topic}. Write exactly three lines, one for each, and nothing else.",
    "List exactly three {topic}, numbered 1 to 3, one on each line. Do not write anything else.",
    "I need three {topic}. Reply only with three numbered lines.",
    "Write down three {topic} as a numbered list (1., 2., 3.). No introduction and no explanation.",
)
NUM_TRAIN_TOPICS = 30
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]
STORIES = (
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", 1),
    ("There are {a} {thing} on the table. {name} puts {b} more {thing} there. How many {thing} are on the table?", 1),
    ("{name} has {a} {thing} and gives {b} of them away. How many {thing} are left?", -1),
)
NAMES = ("Anna", "Ben", "Carla", "David", "Emma")
THINGS = ("apples", "books", "coins", "pencils", "stamps")
NUM_TRAIN, NUM_HELD_OUT = 150, 100


def three_lines(prompt: str, answer: str) -> bool:
    """Exactly three lines, `1.` to `3.` (or `1)`), each with up to 40 characters of text."""
    lines = answer.strip().split("\n")
    return len(lines) == 3 and all(re.fullmatch(rf"{number}[.)] \S.{{0,40}}", line.rstrip()) for number, line in enumerate(lines, 1))


def right_number(prompt: str, answer: str, row: dict[str, object]) -> bool:
    """The last number in the answer is the result."""
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[-1]) == row["answer"]


CHECKS = {"list": "three_lines", "sum": "right_number"}
"""Task -> its check."""


def list_rows() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(training rows, held-out rows)."""
    rows = [[{"prompt": wording.format(topic=topic)} for wording in WORDINGS] for topic in TOPICS]
    parts = rows[:NUM_TRAIN_TOPICS], rows[NUM_TRAIN_TOPICS:]
    train, held_out = (list(itertools.chain.from_iterable(part)) for part in parts)
    return train, held_out


def sum_rows() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(training rows, held-out rows)."""
    draw = random.Random(0)
    pairs = list(itertools.product(range(2, 10), range(2, 10)))
    draw.shuffle(pairs)
    parts = pairs[: len(pairs) * 3 // 5], pairs[len(pairs) * 3 // 5 :]
    train, held_out = (_stories(draw, part, count) for part, count in zip(parts, (NUM_TRAIN, NUM_HELD_OUT), strict=True))
    return train, held_out


def _stories(draw: random.Random, pairs: list[tuple[int, int]], count: int) -> list[dict[str, object]]:
    """So many different ones."""
    found: dict[object, dict[str, object]] = {}
    while len(found) < count:
        row = _story(draw, pairs)
        found[row["prompt"]] = row
    return list(found.values())


def _story(draw: random.Random, pairs: list[tuple[int, int]]) -> dict[str, object]:
    a, b = draw.choice(pairs)
    story, sign = draw.choice(STORIES)
    if sign < 0 and b > a:
        a, b = b, a
    text = story.format(name=draw.choice(NAMES), thing=draw.choice(THINGS), a=NUMBERS[a], b=NUMBERS[b])
    return {"prompt": f"{text} Answer with the number.", "answer": a + sign * b}


ROWS = {"list": list_rows, "sum": sum_rows}


def write(folder: Path) -> None:
    """`list-train.jsonl` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, make in ROWS.items():
        for part, rows in zip(("train", "held-out"), make(), strict=True):
            (folder / f"{task}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
