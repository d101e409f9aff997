"""How the site is built: Sphinx with MyST and furo. `make docs` writes it to docs/_build/html; it opens and searches offline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from orpo.system.version import VERSION

project = "orpo"
author = "the orpo authors"
copyright = author
version = release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "generated", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_ext", "_static"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"orpo {VERSION}"
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # summaries are fetched from the pages, which a browser refuses between files

myst_enable_extensions = ["dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # pages that are also read on their own begin with the level they need

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
smartquotes = False
default_role = "literal"  # docstrings write `name` as Markdown does
napoleon_use_rtype = False
nitpicky = False
