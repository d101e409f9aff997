"""The date that a chat template prints, held fast.

Templates ask for today with `strftime_now(format)`. What a run trains would change at midnight, so the date is taken once, kept with the
run, and used again when the run goes on or is evaluated. transformers binds the function when it compiles a template and takes no other
by keyword; among the compiled template's globals it can be replaced, which is done here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

ASKS = "strftime_now"
"""What a template calls."""


def read_date(text: str | None) -> datetime:
    """A date as it was kept (ISO 8601), or now.

    Raises:
        ValueError: it is no date.
    """
    return datetime.fromisoformat(text) if text else datetime.now().replace(microsecond=0)


@contextmanager
def dated(template: str, date: datetime) -> Iterator[None]:
    """Let a template find this date inside the block, if it asks for one.

    Args:
        template: its text: transformers keeps compiled templates by it, for everybody, so what was there is put back.
        date: what its today is.
    """
    if ASKS not in template:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(template).globals
    before = names[ASKS]
    names[ASKS] = date.strftime
    try:
        yield
    finally:
        names[ASKS] = before
