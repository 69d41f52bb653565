"""``python -m hidiff_runtime.cli``."""

from __future__ import annotations

import sys

from hidiff_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
