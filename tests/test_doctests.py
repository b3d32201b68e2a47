"""The examples in the docstrings of the public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw

#: What examples may take for granted.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "mw": mw, "flax": mw.adapters.flax}
SPACES: tuple[types.ModuleType, ...] = (mw, mw.layers, mw.targets, mw.adapters.flax)
PUBLIC = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in SPACES
    for name in space.__all__
    if inspect.isclass(getattr(space, name)) or inspect.isfunction(getattr(space, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str) -> None:
    public: Any = PUBLIC[name]
    short = name.rpartition(".")[2]
    found = doctest.DocTestFinder().find(public, short, globs=NAMES)
    assert found, f"`{name}` has no docstring"
    own = next(test for test in found if test.name == short)
    assert own.examples, f"the docstring of `{name}` has no example: add one (`>>>`)"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
