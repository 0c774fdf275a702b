"""Where tables and bars of the commands go: results to standard output, how far the work is to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["line_on_stderr", "steps_on_stderr", "table_console"]


def table_console() -> Console:
    """As wide as the terminal; in a file there is no reason to fold a table."""
    return Console() if sys.stdout.isatty() else Console(width=180)


def line_on_stderr(text: str) -> None:
    """A line of its own, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def steps_on_stderr(total: int) -> Iterator[Callable[[str], None]]:
    """A function that is told of each of ``total`` steps as it begins: a bar on a terminal, elsewhere a line a step.

    >>> with steps_on_stderr(2) as tell:
    ...     tell("ceilings")
    [1/2 0:00:00] ceilings
    """
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            begun = [False]

            def advance(what: str) -> None:
                progress.update(task, description=what, advance=1 if begun[0] else 0)
                begun[0] = True

            yield advance
        return
    started, count = time.monotonic(), [0]

    def write(what: str) -> None:
        count[0] += 1
        seconds = int(time.monotonic() - started)
        line_on_stderr(f"[{count[0]}/{total} {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}] {what}")

    yield write
