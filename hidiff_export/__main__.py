"""``python -m hidiff_export`` is ``hidiff-export``."""

from __future__ import annotations

from hidiff_export.cli import main

main(prog_name="hidiff-export")
