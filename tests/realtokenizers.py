"""Where `make tokenizers` puts the published tokenizers of five model families."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orpo" / "tokenizers"
