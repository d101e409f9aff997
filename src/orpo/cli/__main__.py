"""`python -m orpo.cli`, the same as `python -m orpo`."""

from __future__ import annotations

import sys

from orpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
