"""The report of a run or a comparison: one HTML file that opens offline, and the run's model card, from the same facts.

    from orpo.report import write_report
    write_report("runs/first").page        # runs/first/report.html

Nothing is computed here: what `orpo train`, `orpo eval` and `orpo compare` have left in the folder is shown, and what is missing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import UserError

if TYPE_CHECKING:
    from orpo.report.sections import Page

__all__ = ["Report", "write_report"]

PAGE_FILE = "report.html"


@dataclass
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        card: the model card; None where none was written.
        notes: what is missing, damaged or unusual, in sentences.
        cell: what a notebook shows above these: the run's curves and newest values, or a comparison's methods.

    Example: `report` is that of `write_report`.

        >>> report.card is None
        True
    """

    page: Path
    card: Path | None
    notes: list[str] = field(default_factory=list)
    cell: str = field(default="", repr=False)

    def _repr_html_(self) -> str:
        from orpo.report.inline_run import link

        return self.cell + link(self.page, self.notes)


def write_report(
    path: str | Path, *, output: str | Path | None = None, beside: Sequence[str | Path] = (), with_card: bool = True
) -> Report:
    """Write the page of a run or comparison, and a run's card.

    Args:
        path: the folder; one inside a run means the run.
        output: the page's file; None for `report.html` in the folder.
        beside: folders of other runs, or of results of `orpo eval`, whose scores stand beside this one's in the same figures.
        with_card: write README.md of a run, unless somebody else has written one.

    Returns:
        Where they are, and what is missing, damaged or unusual; a notebook shows the run as a table with its curves.

    Raises:
        UserError: the folder is neither a run nor a comparison, plotly is missing, or a file cannot be written.

    Example: the run of `ORPOTrainer`.

        >>> from orpo.report import write_report
        >>> report = write_report("runs/two-steps", output="page.html", with_card=False)
        >>> report.page.name
        'page.html'
    """
    from orpo.report.facts import find_folder, is_comparison, is_rounds, read_results, read_run
    from orpo.report.inline_run import comparison_cell, run_cell
    from orpo.system.installing import pip_line
    from orpo.webpage import require_plotly

    folder = find_folder(path)
    others = {}
    for other in map(find_folder, beside):
        notes: list[str] = []
        others[_name_beside(other)] = read_results(other, notes)
    require_plotly("orpo report", pip_line("report"))
    target = folder / PAGE_FILE if output is None else Path(output).expanduser()
    card, cell = None, ""
    if is_comparison(folder):
        from orpo.report.comparison import comparison_page
        from orpo.report.facts import read_comparison

        found = read_comparison(folder)
        page = comparison_page(found)
        cell = comparison_cell(found, page.lead[0])
    elif is_rounds(folder):
        from orpo.report.roundspage import rounds_page

        page = rounds_page(folder)
    else:
        from orpo.report.runpage import run_page

        facts = read_run(folder)
        page = run_page(facts, others)
        cell = run_cell(facts.logs, page.lead[0])
        if with_card and facts.run:
            from orpo.report.card import write_card

            card = write_card(facts)
    _write(target, page_text(page))
    return Report(target, card, page.notes, cell)


def page_text(page: Page) -> str:
    """A page as HTML."""
    from orpo.report.evaluations import NUM_OPEN_ANSWERS
    from orpo.system.machine import own_version
    from orpo.webpage import render

    sections = [section for section in page.sections if not section.is_empty]
    return render(
        "orpo.report", "page.html.j2", figures=page.figures, page=page, sections=sections, num_open=NUM_OPEN_ANSWERS, version=own_version()
    )


def _name_beside(folder: Path) -> str:
    """A folder's name; of `eval` inside something, that thing's."""
    path = folder.resolve()
    return path.parent.name if path.name == "eval" else path.name


def _write(target: Path, content: str) -> None:
    from orpo.system.files import write_atomically

    if target.is_dir():
        raise UserError("is a folder", where=str(target), expected="a file to write the page to")
    try:
        # Text of a model may hold lone surrogates, which UTF-8 cannot.
        write_atomically(target, content.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(target), mend="choose another place with --output") from error
