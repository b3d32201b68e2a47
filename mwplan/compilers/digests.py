"""Names for programs, made from their jaxprs: two share one only if a compiler makes the same of both.

Lowering a program to have its text costs more than tracing it. A digest has everything that lowering reads:
equations with their parameters, operands and types, constants by what they hold. Calls stand for what they
call, whatever rules of differentiation they have; names of functions and variables do not count.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.network.canonical import CALLS

PyTree = Any
#: Of primitives that hold what they compute: the parameters that lowering reads.
_READ = {
    **{name: {held} for name, held in CALLS.items()},
    "jit": {"jaxpr", "in_shardings", "out_shardings", "in_layouts", "out_layouts"},
    "checkpoint": {"jaxpr", "prevent_cse", "differentiated"},
    "remat2": {"jaxpr", "prevent_cse", "differentiated"},
}
_READ["pjit"] = _READ["jit"]
#: In the text of something that does not say all of what it is: an address, or what was left out.
_SHORT = re.compile(r"\bat 0x|\.\.\.")


class _Unknown(Exception):
    """Something whose text does not tell it from others."""


def digest(program: ClosedJaxpr) -> str | None:
    """The name of a program; None where something in it (a function of Python's that is called back, an array
    that is being traced) cannot be named. **Cost:** some microseconds an equation, and a pass through its
    constants."""
    found = _Digest()
    try:
        found.closed(program)
    except _Unknown:
        return None
    return found.name()


def of_arrays(tree: PyTree) -> str:
    """The name of what the arrays of a tree hold, and of their shapes and types. **Cost:** a pass through
    them, a gigabyte a second; on accelerators a copy of each to the host."""
    found = _Digest()
    for leaf in jax.tree.leaves(tree):
        if trees.is_array(leaf):
            found.array(leaf)
    return found.name()


def of_settings() -> str:
    """What of JAX's settings lowering reads, beside programs."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
    return repr([(name, getattr(jax.config, name)) for name in names] + [str(jax.numpy.result_type(float))])


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.types: dict[Any, str] = {}

    def name(self) -> str:
        return self.hash.hexdigest()

    def say(self, *texts: str) -> None:
        """Texts, so that they cannot run together."""
        for text in texts:
            raw = text.encode()
            self.hash.update(b"%d:" % len(raw) + raw)

    def closed(self, program: ClosedJaxpr) -> None:
        """A program and its constants."""
        self.jaxpr(program.jaxpr)
        self.say(f"{len(program.consts)} constants")
        for one in program.consts:
            self.value(one)

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        """A program, variables by their numbers."""
        numbers: dict[Any, int] = {}

        def made(variables: Iterable[Any]) -> str:
            words = []
            for var in variables:
                numbers[var] = len(numbers)
                words.append(self.type(var.aval))
            return " ".join(words)

        self.say("program", made(jaxpr.constvars), made(jaxpr.invars))
        for eqn in jaxpr.eqns:
            self.say(eqn.primitive.name)
            self.atoms(eqn.invars, numbers)
            self.params(eqn)
            self.say(made(eqn.outvars), self.text(sorted(map(str, eqn.effects))), self.type(eqn.ctx))
        self.say("gives")
        self.atoms(jaxpr.outvars, numbers)

    def atoms(self, atoms: Sequence[Any], numbers: dict[Any, int]) -> None:
        """What is read."""
        for one in atoms:
            if isinstance(one, Literal):
                self.say("literal", self.type(one.aval))
                self.value(one.val)
            else:
                self.say(str(numbers[one]))

    def type(self, aval: Any) -> str:
        """The text of what many equations share."""
        try:
            if aval not in self.types:
                self.types[aval] = self.text(aval)
            return self.types[aval]
        except TypeError:  # it cannot be hashed
            return self.text(aval)

    def params(self, eqn: Any) -> None:
        """What an equation is told."""
        read = _READ.get(eqn.primitive.name)
        for name in sorted(eqn.params):
            if read is None or name in read:
                self.say(name)
                self.value(eqn.params[name])

    def value(self, value: Any) -> None:
        """Something in a program."""
        if isinstance(value, ClosedJaxpr):
            self.closed(value)
        elif isinstance(value, Jaxpr):
            self.jaxpr(value)
        elif type(value).__name__ == "PRNGImpl":  # functions, which its name stands for
            self.say("random numbers", value.name)
        elif isinstance(value, (tuple, list)):
            self.say(f"{type(value).__name__} of {len(value)}")
            for one in value:
                self.value(one)
        elif isinstance(value, dict):
            self.value([(key, value[key]) for key in sorted(value, key=str)])
        elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self.array(value)
        else:
            self.say(type(value).__name__, self.text(value))

    def array(self, value: Any) -> None:
        """An array, by what it holds."""
        if isinstance(value, jax.core.Tracer):
            raise _Unknown
        data = np.asarray(jax.random.key_data(value) if trees.is_key(value) else value)
        self.say(str(jax.typeof(value)), data.dtype.str, str(data.shape))
        if data.dtype == object:
            raise _Unknown
        self.hash.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8))

    def text(self, value: Any) -> str:
        """Of what has a text that says all."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum, np.dtype)):
            return repr(value)
        if callable(value) and not isinstance(value, type):
            raise _Unknown
        text = repr(value)
        if _SHORT.search(text):
            raise _Unknown
        return text
