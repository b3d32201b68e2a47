"""Operations none of whose arrays exists before all of their inputs do: their constants wait for them too.

What an operation makes of constants alone, the zeros that a scatter or a loop writes into, say, depends on
none of its inputs: XLA makes one such array for all layers of a network, at the start of the program, and
where it is written to, a copy for each, there too. Here these constants are made to depend on the
operation's inputs, so that they come with it and go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from mwplan.common import platforms, trees
from mwplan.network.canonical import CALLS, bind, scan_counts

PyTree = Any

#: Bytes of a constant that is left as it is: a number, a few indices.
SMALL = 64
#: Primitives that may write where a constant operand lies, of which they then need a copy.
WRITERS = ("scatter", "dynamic_update_slice", "while", "scan", "sort", "cond")
#: Primitives that XLA:CPU replaces by a program that writes into a constant array of its own.
HIDDEN = ("top_k",)
#: What XLA replaces by a scatter into an array of zeros: the gradient of the largest in a window.
WINDOWED = "select_and_scatter_add"


def tied(
    operation: Callable[..., Any], free: type | tuple[type, ...] = (), *, always: bool = True
) -> Callable[..., Any]:
    """`operation`, no part of which XLA starts before all arguments are there, but for those in nodes of the
    types `free`; constants of more than a few bytes are parts too. Not `always`: only where it writes into
    such constants; else it is as it was.

    Same values. Where there are such constants it is not to be differentiated any more: rules of
    `jax.custom_vjp` are gone.
    """

    def call(*args: Any) -> Any:
        args = trees.vary(args, trees.varying_axes(args))  # as the barrier makes them
        made = Traced(operation, args)
        if not always and not (_has_constants(made.closed) and writes(made.closed.jaxpr)):
            return operation(*args)
        if not _has_constants(made.closed):
            return made.result(jaxpr_as_fun(made.closed)(*made.arrays(trees.tie(args, free))))
        # Of all arguments, and one number more, which is there when they are.
        args, zero = trees.tie((args, jnp.zeros((), jnp.uint8)), free)
        values = made.arrays(args)
        return made.result(_Evaluation(zero).run(made.closed.jaxpr, made.closed.consts, values))

    return call


def waiting(program: ClosedJaxpr) -> Callable[..., list[Any]]:
    """A program, no part of which XLA starts before all of its arguments are there: `tied`, of what is traced
    already."""

    def call(*arrays: Any) -> list[Any]:
        if not _has_constants(program):
            found: list[Any] = jaxpr_as_fun(program)(*trees.tie(arrays))
            return found
        arrays, zero = trees.tie((arrays, jnp.zeros((), jnp.uint8)))
        return _Evaluation(zero).run(program.jaxpr, program.consts, arrays)

    return call


class Traced:
    """`operation` at `args`, arrays or shapes, as a program of arrays, `closed`; float0 zeros, and what is no
    array, stay outside."""

    def __init__(self, operation: Callable[..., Any], args: tuple[Any, ...]) -> None:
        leaves, treedef = jax.tree.flatten(args)
        self.where = [i for i, leaf in enumerate(leaves) if _is_value(leaf)]
        self.fixed: list[Any] = []

        def flat(arrays: list[Any]) -> list[Any]:
            given = [trees.no_cotangent(leaf) if trees.is_float0(leaf) else leaf for leaf in leaves]
            for i, array in zip(self.where, arrays):
                given[i] = array
            out, self.treedef = jax.tree.flatten(operation(*jax.tree.unflatten(treedef, given)))
            self.fixed = [None if _is_value(leaf) else _outside(leaf) for leaf in out]
            return [leaf for leaf in out if _is_value(leaf)]

        self.closed: ClosedJaxpr = jax.make_jaxpr(flat)(self.arrays(args))

    def arrays(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments of the program."""
        leaves = jax.tree.leaves(args)
        return [leaves[i] for i in self.where]

    def result(self, values: Sequence[Any]) -> Any:
        """What `operation` returns, from what the program does."""
        given = iter(values)
        leaves = [next(given) if leaf is None else leaf for leaf in self.fixed]
        return jax.tree.unflatten(self.treedef, leaves)


def _is_value(leaf: Any) -> bool:
    return (trees.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)) and not trees.is_float0(leaf)


def _outside(leaf: Any) -> Any:
    """What is no value of the program, without the program: of float0 only its shape is known."""
    return trees.no_cotangent(leaf) if trees.is_array(leaf) else leaf


def _nbytes(aval: Any) -> int:
    return trees.nbytes(aval) if hasattr(aval, "dtype") and hasattr(aval, "shape") else 0


def _has_constants(closed: ClosedJaxpr) -> bool:
    """Whether the program makes an array of constants alone, writes into one, or makes one in a loop."""
    return any(_nbytes(var.aval) > SMALL for var in closed.jaxpr.constvars) or _makes(closed.jaxpr)


def _hides(eqn: Any) -> bool:
    return eqn.primitive.name in HIDDEN and platforms.platform() == "cpu"


def _inside(eqn: Any) -> list[Jaxpr]:
    """What an equation calls."""
    inner = [eqn.params.get(CALLS.get(eqn.primitive.name, "")), eqn.params.get("jaxpr")]
    found = [one.jaxpr if isinstance(one, ClosedJaxpr) else one for one in inner]
    return [one for one in found if isinstance(one, Jaxpr)]


def _writer(eqn: Any) -> bool:
    name: str = eqn.primitive.name
    return name in WRITERS or name == WINDOWED or name.startswith("scatter")


def writes(jaxpr: Jaxpr) -> bool:
    """Whether some part of the program writes into an operand."""
    return any(_writer(eqn) or any(map(writes, _inside(eqn))) for eqn in jaxpr.eqns)


def _makes(jaxpr: Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        depends = any(isinstance(var, Var) for var in eqn.invars)
        if not depends and any(_nbytes(var.aval) > SMALL for var in eqn.outvars):
            return True
        if eqn.primitive.name == "scan" and len(eqn.outvars) > scan_counts(eqn.params)[1]:
            return True
        if _hides(eqn) or eqn.primitive.name == WINDOWED:
            return True
        if eqn.primitive.name != "scan" and any(map(_makes, _inside(eqn))):
            return True
    return False


class _Constant:
    """A value that depends on none of the operation's inputs."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _typed(value: Any, aval: Any) -> Any:
    """`value` weakly typed where the program's own is."""
    if isinstance(value, _Constant) or not getattr(aval, "weak_type", False) or trees.is_weak(value):
        return value
    return trees.weakened(value)


class _Evaluation:
    """Evaluates a program; `zero`: a number that is there when the operation's inputs are.

    Within `jax.shard_map` it varies from device to device as the inputs do, and so does what is computed
    from it. A constant that the program has as the same on all devices is left so: it waits from where the
    program declares it to vary.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.axes = trees.varying_axes(zero)

    def may_wait(self, value: Any) -> bool:
        """Whether `value`, or a type, still varies along the same axes if it is computed from `zero`."""
        return self.axes <= trees.varying_axes(value)

    def waits(self, value: Any) -> Any:
        """`value`, not there before the operation's inputs: computed from `zero`, to the last bit, if it may.

        A barrier around both would not do: of its results what nobody uses is dropped, with what it waits
        for.
        """
        if not self.may_wait(value):
            return value
        if trees.is_key(value):
            data = self.waits(jax.random.key_data(value))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        value = jnp.asarray(value)
        if value.dtype == jnp.bool_:
            return value ^ (self.zero != 0)
        if jnp.issubdtype(value.dtype, jnp.floating):
            return value * (self.zero + 1).astype(value.dtype)  # -0.0 + 0.0 would be 0.0
        return value + self.zero.astype(value.dtype)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The program's results, none of them a `_Constant`."""
        found = self.evaluate(jaxpr, [_Constant(const) for const in consts], args)
        return [self.waits(one.value) if isinstance(one, _Constant) else one for one in found]

    def evaluate(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The program's results; those that depend on none of `args` are `_Constant`s, as these may be."""
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

        def read(var: Any) -> Any:
            return _Constant(var.val) if isinstance(var, Literal) else env[var]

        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [read(var) for var in eqn.invars])
            env.update((var, _typed(value, var.aval)) for var, value in zip(eqn.outvars, found))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """One equation's results."""
        name = eqn.primitive.name
        if name in CALLS:
            inner = eqn.params[CALLS[name]]
            return self.evaluate(inner.jaxpr, [_Constant(const) for const in inner.consts], values)
        if name in ("remat2", "checkpoint"):
            return self.checkpoint(eqn, values)
        constant = all(isinstance(value, _Constant) for value in values) and not eqn.effects
        large = any(_nbytes(var.aval) > SMALL for var in eqn.outvars)
        if constant and not (large and any(self.may_wait(var.aval) for var in eqn.outvars)):
            return [_Constant(one) for one in bind(eqn, [value.value for value in values])]
        if constant and not any(self.may_wait(value.value) for value in values):
            return [self.waits(one) for one in bind(eqn, [value.value for value in values])]
        waits = constant or _writer(eqn)
        given = [
            (self.waits(value.value) if waits else value.value) if isinstance(value, _Constant) else value
            for value in values
        ]
        if _hides(eqn) and all(self.may_wait(var.aval) for var in eqn.outvars):
            return self.branch(eqn, given)
        if name == WINDOWED and self.may_wait(eqn.outvars[0].aval):
            return [self.windowed(eqn, *given)]
        return self.scan(eqn, given) if name == "scan" else bind(eqn, given)

    def branch(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The equation in a branch of a choice, always taken: its constants are made there, when it is."""

        def taken(values: list[Any]) -> list[Any]:
            return bind(eqn, values)

        def other(values: list[Any]) -> list[Any]:
            structs = jax.eval_shape(taken, values)
            return [trees.vary(jnp.zeros(s.shape, s.dtype), trees.varying_axes(s)) for s in structs]

        return list(lax.cond(self.zero == 0, taken, other, values))

    def windowed(self, eqn: Any, source: Any, operand: Any) -> Any:
        """The gradient of the largest (or least) of each window, scattered into zeros that wait."""
        names = ("window_dimensions", "window_strides", "padding")
        window = {name: eqn.params[name] for name in names}
        zero = self.zero.astype(operand.dtype)
        select = jax.make_jaxpr(eqn.params["select_prim"].bind)(zero, zero).jaxpr
        add = jax.make_jaxpr(jnp.add)(zero, zero).jaxpr
        both = {"select_jaxpr": select, "select_consts": (), "scatter_jaxpr": add, "scatter_consts": ()}
        scattered: Any = lax.select_and_scatter_p.bind(operand, source, zero, **both, **window)
        return scattered

    def checkpoint(self, eqn: Any, values: list[Any]) -> list[Any]:
        """What `jax.checkpoint` computes (again), its own constants too after what it computes it from."""
        given = [value.value if isinstance(value, _Constant) else value for value in values]
        inner = self
        if eqn.params["differentiated"] and eqn.params["prevent_cse"]:
            # A barrier's results all vary along the same axes.
            alike = [i for i, value in enumerate(given) if trees.varying_axes(value) == self.axes]
            after, zero = trees.tie(([given[i] for i in alike], self.zero))
            for i, value in zip(alike, after):
                given[i] = value
            inner = _Evaluation(zero)
        return inner.run(eqn.params["jaxpr"], (), given)

    def scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        """A scan whose stacked results do not exist before the operation's inputs do."""
        params = eqn.params
        consts, carried = scan_counts(params)
        if len(eqn.outvars) == carried:
            return bind(eqn, values)
        fixed, state, rows = values[:consts], values[consts : consts + carried], values[consts + carried :]
        body = jaxpr_as_fun(params["jaxpr"])
        stacked = [
            trees.vary(self.zeros(var.aval), trees.varying_axes(var.aval)) for var in eqn.outvars[carried:]
        ]
        length, reverse, unroll = params["length"], params["reverse"], max(1, params.get("unroll", 1))

        def step(i: Any, both: Any) -> Any:
            state, stacked = both
            at = length - 1 - i if reverse else i
            found = body(*fixed, *state, *_rows(rows, at))
            new = [_put(old, one, at) for old, one in zip(stacked, found[carried:])]
            return found[:carried], new

        state, stacked = lax.fori_loop(0, length, step, (state, stacked), unroll=min(unroll, max(1, length)))
        return [*state, *stacked]

    def zeros(self, aval: Any) -> Any:
        """Zeros (typed keys of zeros) that wait, if they may."""
        zero = self.zero if self.may_wait(aval) else jnp.zeros((), self.zero.dtype)
        if trees.is_key(aval):
            return jnp.full(aval.shape, zero, aval.dtype)
        return jnp.broadcast_to(zero.astype(aval.dtype), aval.shape)


def _rows(rows: list[Any], i: Any) -> list[Any]:
    return [lax.dynamic_index_in_dim(row, i, keepdims=False, allow_negative_indices=False) for row in rows]


def _put(rows: Any, new: Any, i: Any) -> Any:
    return lax.dynamic_update_index_in_dim(rows, new, i, 0, allow_negative_indices=False)
