"""A progress bar for whoever waits at a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

#: `progress(done, of, what)`
Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def shown(progress: Progress | bool | None, title: str) -> Iterator[Progress]:
    """`progress` itself; where it is None, a bar on standard error if that is a terminal; where it is True, a
    bar anyway; else nothing. The bar is gone in the end."""
    if callable(progress):
        yield progress
        return
    if progress is False:
        yield lambda done, of, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, force_terminal=True if progress else None)
    if progress is None and not console.is_terminal:
        yield lambda done, of, what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        row = bar.add_task(title, total=None)

        def tell(done: int, of: int, what: str) -> None:
            bar.update(row, completed=done, total=of, description=f"{title} {what}")

        yield tell
