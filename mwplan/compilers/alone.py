"""An operation as a program of its own, whose compiler says what it needs: by itself, and as the last user of
what it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from mwplan.common import trees
from mwplan.compilers import digests
from mwplan.network.constants import Traced

PyTree = Any
SMALL = 1 << 14  # bytes: below, a saving is not worth a compilation


def with_float0(like: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """`arrays`, and float0 zeros where `like`, the leaves of what a function takes, has such ones."""
    rest = iter(arrays)
    return [trees.no_cotangent(leaf) if trees.is_float0(leaf) else next(rest) for leaf in like]


class Alone:
    """One operation, traced once.

    **Attributes:** `result`, the shapes of what it gives; `inputs` and `outputs`, the leaves of its arguments
    and of its result without float0 ones, objects of their own, by which operations find one another;
    `function(*inputs)`, which gives `outputs`; `jaxpr`, its program; `digest`, its name, if it can have one
    (`mwplan.compilers.digests`).
    """

    def __init__(
        self, operation: Callable[..., Any], args: Any, performed: Callable[..., Any] | None = None
    ) -> None:
        made = self._made = Traced(performed or operation, args)
        self.operation, self.args = operation, args
        self.inputs = made.arrays(args)
        self.jaxpr = made.closed
        self.function = jaxpr_as_fun(self.jaxpr)
        avals: list[Any] = self.jaxpr.out_avals
        weak = (bool(getattr(aval, "weak_type", False)) for aval in avals)
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=w) for a, w in zip(avals, weak)]
        self.result: Any = trees.struct(self.returned(structs))
        self.outputs = [leaf for leaf in jax.tree.leaves(self.result) if not trees.is_float0(leaf)]

    def returned(self, outputs: Sequence[Any]) -> Any:
        """What the operation returns, from its outputs."""
        return self._made.result(outputs)

    @functools.cached_property
    def digest(self) -> str | None:
        """As the attribute."""
        return digests.digest(self.jaxpr)


def named(operations: Sequence[Alone]) -> str | None:
    """A name for operations that follow one another: theirs, and what they hand to one another. None where
    one has none."""
    digests = [one.digest for one in operations]
    leaves = [leaf for one in operations for leaf in (*one.inputs, *one.outputs)]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(map(id, leaves)))}
    return None if None in digests else repr((digests, [numbers[id(leaf)] for leaf in leaves]))


class LastUser:
    """A program that needs less than an operation's inputs + outputs + workspace, since the operation is the
    last user of `dead`.

    `dead`: leaves of its arguments (found by identity); `temporary`: those of its result that are no outputs
    of the step, as gradients are. In the program `step(inputs, zero)` both come and go: XLA then places
    outputs where dead inputs were, as it will within a step, and the program's temporaries are what the
    operation really needs. `worth`: whether that can be much.
    """

    def __init__(self, alone: Alone, dead: PyTree, temporary: PyTree) -> None:
        self.alone = alone
        gone = {id(leaf) for leaf in jax.tree.leaves(dead)}
        picked = {id(leaf) for leaf in jax.tree.leaves(temporary)}
        self._dies = [id(leaf) in gone for leaf in alone.inputs]
        self._goes = [id(leaf) in picked for leaf in alone.outputs]
        self._dying = [leaf for leaf, dies in zip(alone.inputs, self._dies) if dies]
        made = [leaf for leaf, goes in zip(alone.outputs, self._goes) if goes]
        self.worth = min(trees.nbytes(self._dying), trees.nbytes(made)) >= SMALL
        given = {*alone.jaxpr.jaxpr.invars}
        # What is passed through as it came takes no memory of its own.
        through = [not isinstance(var, Literal) and var in given for var in alone.jaxpr.jaxpr.outvars]
        self._new = [goes or not same for goes, same in zip(self._goes, through, strict=True)]

    @property
    def shapes(self) -> tuple[list[Any], jax.ShapeDtypeStruct]:
        """The arguments of `step`."""
        return self.alone.inputs, jax.ShapeDtypeStruct((), jnp.int32)

    @property
    def apart_bytes(self) -> int:
        """Of what `step` reads for the last time and of what it makes."""
        made = [leaf for leaf, new in zip(self.alone.outputs, self._new) if new]
        return trees.nbytes(self._dying) + trees.nbytes(made)

    @property
    def digest(self) -> str | None:
        """The name of `step`, if it can have one."""
        return self.alone.digest and f"{self.alone.digest} {self._dies} {self._goes}"

    def step(self, leaves: list[Any], zero: Any) -> list[Any]:
        """The program: the operation between copies and sums; `zero` is 0."""
        fresh = trees.tie([moved(leaf, zero) if dies else leaf for leaf, dies in zip(leaves, self._dies)])
        result = self.alone.function(*fresh)
        # Gradients too leave as sums: in an output's buffer the compiler would find room for temporaries
        # until it is written.
        return [summed(leaf) for leaf in trees.tie([leaf for leaf, new in zip(result, self._new) if new])]


def moved(leaf: Any, zero: Any) -> Any:
    """A copy that the compiler must make: `zero` is 0, and only known when the program runs."""
    if trees.is_key(leaf):
        return jax.random.wrap_key_data(
            moved(jax.random.key_data(leaf), zero), impl=jax.random.key_impl(leaf)
        )
    if leaf.dtype == jnp.bool_:
        return leaf ^ (zero != 0)
    return trees.typed_like(leaf + jnp.asarray(zero).astype(leaf.dtype), leaf)


def summed(leaf: Any) -> Any:
    """One number that needs all of `leaf`."""
    return jnp.sum((jax.random.key_data(leaf) if trees.is_key(leaf) else leaf).astype(jnp.float32))
