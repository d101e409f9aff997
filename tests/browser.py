"""A real headless Chromium for tests of pages: what the page became, what its console said, what it looks like.

Nothing is fetched: the browser's own background traffic is off, and pages are files. Every call is bounded in time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr"),
)
TIMEOUT_S = 240


@dataclass
class Visit:
    """What came of opening a page.

    Attributes:
        dom: the document after its scripts have run.
        console: what scripts and the page's policy complained about.
    """

    dom: str = ""
    console: list[str] = field(default_factory=list)


def find_browser() -> str:
    """The browser's path; skips where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed: the page is not opened in a browser")
    return found


def visit(
    page: Path, profile: Path, *, query: str = "", width: int = 1180, height: int = 1600, picture: Path | None = None, dark: bool = False
) -> Visit:
    """Open a page: its document, or with `picture` a screenshot.

    Args:
        page: the file.
        profile: a new folder for the browser's own files.
        query: what stands behind the address, such as `?q=word`.
        width, height: of the window.
        picture: PNG to write; the document is not read then.
        dark: as on a screen whose user prefers dark pages.
    """
    flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=10000"]
    flags += [f"--screenshot={picture}" if picture else "--dump-dom"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([find_browser(), *flags, page.as_uri() + query], capture_output=True, timeout=TIMEOUT_S, check=False)
    log = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    return Visit(done.stdout.decode("utf-8", "replace"), re.findall(r"CONSOLE[^\]]*\] (.*)", log))
