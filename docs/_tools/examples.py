"""An extension of Griffe: the examples of docstrings (`>>>`) as blocks of code.

The docstrings of this project are Markdown with doctests, which Markdown takes for quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Lines from `>>>` up to the next empty line.
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*?(?=^\s*$|\Z)", re.DOTALL | re.MULTILINE)


def fenced(text: str) -> str:
    """`text` with its examples between fences."""

    def one(found: re.Match[str]) -> str:
        code = found[0].rstrip("\n")
        return f"{found['indent']}```pycon\n{code}\n{found['indent']}```\n"

    return DOCTEST.sub(one, text)


class Examples(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
