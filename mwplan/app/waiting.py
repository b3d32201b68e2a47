"""Progress for whoever waits at a terminal; elsewhere nothing is shown."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds that pass before anything is shown of what may be quick.
PATIENCE_S = 2.0
err = Console(stderr=True)


@contextlib.contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """A function `advance(phase, done, of)`, and a bar for each phase."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        rows: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in rows or bar.tasks[rows[phase]].finished:
                rows[phase] = bar.add_task(phase, total=total)
            bar.update(rows[phase], completed=done, total=total)

        yield advance


@contextlib.contextmanager
def waiting(what: str, after_s: float = PATIENCE_S) -> Iterator[None]:
    """A bar that moves while `what` takes its time, which nobody knows beforehand; only where it takes more
    than `after_s` seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    bar.add_task(what, total=None)
    timer = threading.Timer(after_s, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
