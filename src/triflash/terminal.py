"""Where tables and bars of the commands go."""

from __future__ import annotations

import sys

from rich.console import Console


def table_console() -> Console:
    """As wide as the terminal; in a file there is no reason to fold a table."""
    return Console() if sys.stdout.isatty() else Console(width=180)
