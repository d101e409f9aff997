"""Reading the pages that the project writes: tags, attributes and texts, without a browser; and text that tries to break out of them."""

from __future__ import annotations

import html.parser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;<b>"


class Page(html.parser.HTMLParser):
    """Tags, attributes and texts of a page; scripts apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def parse(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    return parser
