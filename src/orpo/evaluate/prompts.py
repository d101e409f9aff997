"""Prompts and given answers of your own, from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import DataError, UserError

if TYPE_CHECKING:
    from orpo.data.types import Text

NEUTRAL_TEXT = Path(__file__).parent / "neutral.txt"
NEUTRAL_PROMPTS = Path(__file__).parent / "neutral_prompts.txt"


def read_prompts(path: Path) -> list[Text]:
    """Prompts of a file: rows with `prompt`, `instruction`, `question` or `messages`; a `.txt` holds them parted by blank lines.

    Raises:
        DataError: a row has none of them.
    """
    from orpo.data.formats import read_source

    if path.suffix == ".txt":
        return list(read_passages(path))

    prompts: list[Text] = []
    for where, row in read_source(str(path), None):
        value = next(
            (row[name] for name in ("prompt", "instruction", "question", "messages") if isinstance(row, dict) and row.get(name)), None
        )
        if isinstance(value, str):
            prompts.append(value)
        elif isinstance(value, list) and all(isinstance(message, dict) and "role" in message and "content" in message for message in value):
            prompts.append(tuple(value))
        else:
            raise DataError("no prompt in this row", where=str(where), expected="prompt, instruction or question as text, or messages")
    if not prompts:
        raise DataError("there are no prompts", where=str(path))
    return prompts


def read_prompt_answers(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) rows of a file: `prompt` or `instruction`, and `response`, `answer` or `output`.

    Raises:
        DataError: a row lacks one.
    """
    from orpo.data.formats import read_source

    found = []
    for where, row in read_source(str(path), None):
        prompt = next((row[name] for name in ("prompt", "instruction") if isinstance(row, dict) and isinstance(row.get(name), str)), None)
        answer = next(
            (row[name] for name in ("response", "answer", "output") if isinstance(row, dict) and isinstance(row.get(name), str)), None
        )
        if prompt is None or answer is None:
            raise DataError(
                "not a prompt with its answer", where=str(where), expected="prompt (or instruction), and response (answer, output)"
            )
        found.append((prompt, answer))
    return found


def read_passages(path: str | Path = NEUTRAL_TEXT) -> list[str]:
    """The passages of a text file: parted by blank lines.

    Raises:
        UserError: it cannot be read.
        DataError: it is empty.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", where=str(path)) from error
    passages = [" ".join(part.split("\n")).strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    passages = [passage for passage in passages if passage]
    if not passages:
        raise DataError("there is no text", where=str(path))
    return passages
