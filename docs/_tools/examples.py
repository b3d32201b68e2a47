"""An extension of Griffe: this project's docstrings as the Markdown that they are.

Examples (`>>>`), which Markdown takes for quotations, become blocks of code, and what begins with a word such
as **Returns:** a paragraph of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Lines from `>>>` up to the next empty line.
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*?(?=^\s*$|\Z)", re.DOTALL | re.MULTILINE)
#: A line that begins with **Word:**, behind another one.
PART = re.compile(r"(?<=[^\n])\n(?= *\*\*[A-Z][\w, ]*:\*\*)")


def as_markdown(text: str) -> str:
    """`text` with its examples between fences, and its parts apart."""

    def fenced(found: re.Match[str]) -> str:
        code = found[0].rstrip("\n")
        return f"{found['indent']}```pycon\n{code}\n{found['indent']}```\n"

    return DOCTEST.sub(fenced, PART.sub("\n\n", text))


class Examples(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
