"""The examples in the docstrings of the public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw

#: What examples may take for granted.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "mw": mw}
PUBLIC = [
    name for name in mw.__all__ if inspect.isclass(getattr(mw, name)) or inspect.isfunction(getattr(mw, name))
]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str) -> None:
    public: Any = getattr(mw, name)
    found = doctest.DocTestFinder().find(public, name, globs=NAMES)
    assert found, f"`mw.{name}` has no docstring"
    own = next(test for test in found if test.name == name)
    assert own.examples, f"the docstring of `mw.{name}` has no example: add one (`>>>`)"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
