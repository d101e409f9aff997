"""`python -m orpo`, the same as the command `orpo`; the form that launchers such as torchrun need."""

from __future__ import annotations

import sys

from orpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
