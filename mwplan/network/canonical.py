"""Convolutions in the one layout that XLA:CPU runs fast inside loops.

XLA:CPU brings convolutions into the layout of its fast kernels, batch first and channels last, in a program's
entry computation only; in the body of a loop the gradients that JAX derives, whose dimensions are permuted,
fall back to a kernel 30 to 70 times slower (jax#12868; measured with jaxlib 0.10.2). Here the permutations
are made explicit, so that the convolution itself is in that layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

#: Primitives that only call what they hold.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "bilinear": "jaxpr",
}


def canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every convolution, those within calls, loops, branches and `jax.checkpoint` included,
    in batch-first, channels-last layout.

    Same values; a transposed copy of an operand where its layout was another. Not to be differentiated any
    more: rules of `jax.custom_vjp` and `layers.bilinear` are gone.
    """

    def call(*args: Any) -> Any:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        values = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return call


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if eqn.primitive is lax.conv_general_dilated_p:
            out = [_convolution(*values, **eqn.params)]
        elif eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            out = _evaluate(inner.jaxpr, inner.consts, values)
        else:
            params = eqn.params
            if _convolves(eqn):
                params = {name: _inside(value) for name, value in params.items()}
            out = bind(eqn, values, params)
        env.update(zip(eqn.outvars, out))
    return [read(var) for var in jaxpr.outvars]


def bind(eqn: Any, values: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """The results of an equation at other values, with other parameters."""
    params = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # older jax, newer jax
    got = eqn.primitive.bind(*functions, *values, **params)
    return list(got) if eqn.primitive.multiple_results else [got]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a `scan`'s inputs are read whole in each turn, and how many are carried on."""
    if "ft_in" in params:  # since JAX 0.12
        consts, carried, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carried))
    return params["num_consts"], params["num_carry"]


def _jaxprs(value: Any) -> list[Jaxpr]:
    """The programs in an equation's parameter: one, the branches of a choice, or none."""
    several = value if isinstance(value, (tuple, list)) else (value,)
    closed = [one.jaxpr if isinstance(one, ClosedJaxpr) else one for one in several]
    return [one for one in closed if isinstance(one, Jaxpr)]


def _convolves(eqn: Any) -> bool:
    if eqn.primitive is lax.conv_general_dilated_p:
        return True
    return any(_convolves(e) for value in eqn.params.values() for jaxpr in _jaxprs(value) for e in jaxpr.eqns)


def _inside(value: Any) -> Any:
    """An equation's parameter, its programs in the canonical layout."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_inside, value)) if _jaxprs(value) else value
    if isinstance(value, ClosedJaxpr):
        return jax.make_jaxpr(lambda *args: _evaluate(value.jaxpr, value.consts, args))(*value.in_avals)
    if isinstance(value, Jaxpr):
        closed = _inside(ClosedJaxpr(value, ()))
        return value if closed.consts else closed.jaxpr  # there is no place for constants: right, and slow
    return value


def _convolution(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """`lax.conv_general_dilated` of operands permuted to the canonical layout."""
    names = dimension_numbers
    batch, features, *space = names.lhs_spec
    outer, inner, *taps = names.rhs_spec
    last = lhs.ndim - 1
    spec = (0, last, *range(1, last))
    canon = lax.ConvDimensionNumbers(spec, (last, last - 1, *range(last - 1)), spec)
    if names == canon:
        return lax.conv_general_dilated_p.bind(lhs, rhs, dimension_numbers=names, **params)
    moved = (lax.transpose(lhs, (batch, *space, features)), lax.transpose(rhs, (*taps, inner, outer)))
    # Without this XLA folds the permutations back into the convolution.
    moved = lax.optimization_barrier(moved)
    y = lax.conv_general_dilated_p.bind(*moved, dimension_numbers=canon, **params)
    position = (names.out_spec[0], *names.out_spec[2:], names.out_spec[1])  # where each of y's axes belongs
    return lax.transpose(y, sorted(range(y.ndim), key=position.__getitem__))
