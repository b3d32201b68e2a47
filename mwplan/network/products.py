"""What several products read is written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from mwplan.network.canonical import CALLS, bind
from mwplan.network.constants import Traced

PRODUCTS = ("dot_general", "conv_general_dilated")
#: What passes an array on in another shape.
_VIEWS = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy")
#: What writes arrays side by side, in a kernel that fuses with no product.
_JOINED = ("concatenate", "pad")
_CHECKPOINTS = ("remat2", "checkpoint")


def written_once(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`operation`, in which each array that is written side by side (`jnp.concatenate`, the gradient of
    `jnp.split`) and that two products read (a cotangent: one product gives the weights' gradient, one goes
    on) is behind a barrier of its own.

    Else XLA:GPU writes it again for each of them, and may write both before either is read: the operation
    takes an array more than it need. What is elementwise it fuses or writes once as it is. Same values. Where
    there is such an array it is not to be differentiated any more: rules of `jax.custom_vjp` are gone."""

    def call(*args: Any) -> Any:
        made = Traced(operation, args)
        if not _any_shared(made.closed.jaxpr):
            return operation(*args)
        return made.result(_evaluate(made.closed.jaxpr, made.closed.consts, made.arrays(args)))

    return call


def _shared(jaxpr: Jaxpr) -> set[Any]:
    """The variables that a program writes side by side and at least two of its products read, in whatever
    shape."""
    roots, readers = _roots(jaxpr), dict[Any, int]()
    for eqn in _alive(jaxpr):
        if eqn.primitive.name in PRODUCTS:
            for var in {roots.get(var, var) for var in eqn.invars if isinstance(var, Var)}:
                readers[var] = readers.get(var, 0) + 1
    return {var for var, count in readers.items() if count > 1 and var in _joined(jaxpr)}


def _joined(jaxpr: Jaxpr) -> set[Any]:
    """The variables that are written side by side, in the program or in what it calls."""
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _JOINED:
            found.update(eqn.outvars)
        elif (inner := _inner(eqn)) is not None:
            within, roots = _joined(inner), _roots(inner)
            for outer, var in zip(eqn.outvars, inner.outvars):
                if isinstance(var, Var) and roots.get(var, var) in within:
                    found.add(outer)
    return found


def _roots(jaxpr: Jaxpr) -> dict[Any, Any]:
    """The variables that others are in another shape."""
    found: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _VIEWS and isinstance(eqn.invars[0], Var):
            found[eqn.outvars[0]] = found.get(eqn.invars[0], eqn.invars[0])
    return found


def _alive(jaxpr: Jaxpr) -> list[Any]:
    """The equations that its results come from: the gradients that JAX derives have others too."""
    wanted, found = {var for var in jaxpr.outvars if isinstance(var, Var)}, []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            wanted.update(var for var in eqn.invars if isinstance(var, Var))
            found.append(eqn)
    return found[::-1]


def _inner(eqn: Any) -> Jaxpr | None:
    """The program that an equation calls, or computes again."""
    name = eqn.primitive.name
    one: Any = eqn.params.get("jaxpr" if name in _CHECKPOINTS else CALLS.get(name, ""))
    found: Jaxpr | None = one.jaxpr if isinstance(one, ClosedJaxpr) else one
    return found


def _any_shared(jaxpr: Jaxpr) -> bool:
    inside = (_inner(eqn) for eqn in _alive(jaxpr))
    return bool(_shared(jaxpr)) or any(_any_shared(one) for one in inside if one is not None)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    shared = _shared(jaxpr)
    for eqn in jaxpr.eqns:
        values = [var.val if isinstance(var, Literal) else env[var] for var in eqn.invars]
        inner = _inner(eqn)
        if inner is None or not _any_shared(inner):
            found = bind(eqn, values)
        elif eqn.primitive.name in _CHECKPOINTS:
            avals = [var.aval for var in inner.invars]
            again = jax.make_jaxpr(lambda *args, inner=inner: _evaluate(inner, (), args))(*avals)
            found = (
                bind(eqn, values, {**eqn.params, "jaxpr": again.jaxpr})
                if not again.consts
                else bind(eqn, values)
            )
        else:
            called = eqn.params[CALLS[eqn.primitive.name]]
            found = _evaluate(inner, getattr(called, "consts", ()), values)
        for var, value in zip(eqn.outvars, found):
            env[var] = lax.optimization_barrier(value) if var in shared else value
    return [var.val if isinstance(var, Literal) else env[var] for var in jaxpr.outvars]
