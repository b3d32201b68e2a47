"""Shapes and dtypes checked while the tests run: what jaxtyping's import hook decorates functions with.

Annotations of arrays (`Float[Array, "batch inner"]`) are checked by beartype at each call, under tracing too;
all others are mypy's, and are left out: some of them cannot be checked at run time, or take long.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_ARRAYS = re.compile(r"\b(Bool|Complex|Float|Inexact|Int|Integer|Key|Num|Shaped|UInt)\w*\[")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its array annotations checked; itself where it has none, and classes as they are.

    What dataclasses hold is not checked: JAX fills pytrees with what is no array.
    """
    if isinstance(function, type) or function.__name__ == "__init__":
        return function
    texts = function.__annotations__
    arrays = {name: hint for name, hint in texts.items() if _ARRAYS.search(_text(hint))}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return beartype(function)


def _text(hint: Any) -> str:
    return hint if isinstance(hint, str) else repr(hint)
