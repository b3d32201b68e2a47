"""A report as one HTML file that needs nothing else: its figures, their script and plotly's are in it."""

from __future__ import annotations

import html
import json
import string
from importlib import resources
from pathlib import Path

from mwplan.common import serial
from mwplan.common.errors import ArgumentError, MwplanError
from mwplan.report.content import Subject, content


def check_target(to: str | Path) -> Path:
    """`to` as a path to write a page to. Raises `ArgumentError` for what cannot be one, `MwplanError`
    where plotly is not installed: before anything is computed."""
    path = Path(to)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"`to={str(to)!r}` must be the name of an HTML file, such as plan.html")
    if path.is_dir():
        raise ArgumentError(f"`to={str(to)!r}` is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ArgumentError(f"`to={str(to)!r}`: the folder {path.parent} does not exist: make it first")
    plotly()
    return path


def plotly() -> str:
    """Plotly's script. Raises `MwplanError` where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MwplanError(
            'a report is drawn by plotly, which is not installed: pip install "mwplan[report]" '
            '(in a checkout: pip install -e ".[report]")'
        ) from error
    script: str = get_plotlyjs()
    return script


def write(to: str | Path, subject: Subject) -> Path:
    """Writes the page, whole or not at all. Raises as `check_target`. Cost: a replay of each schedule; the
    file has 5 MB for plotly and some kilobytes a schedule."""
    path = check_target(to)
    serial.write_atomically(path, page(subject))
    return path


def page(subject: Subject) -> str:
    """The page's text."""
    shown = content(subject)
    files = resources.files("mwplan.report")
    read = {name: (files / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # Within a script element only "<" could end it; JSON may say it otherwise.
    figures = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    return string.Template(read["html"]).substitute(
        title=html.escape(shown["title"]),
        css=read["css"],
        content=figures,
        plotly=plotly(),
        script=read["js"],
    )
