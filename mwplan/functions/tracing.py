"""A function and its loss as one flat list of operations.

The function is traced by `jax.make_jaxpr`. Calls (`jax.jit`, `jax.checkpoint` unless asked to keep it) are
opened, what no result needs is left out, and arrays that the function closes over become arguments like any
other."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.functions.signature import Signature, traceable, warn_if_lost

PyTree = Any

#: Operations that only call the program that they hold, and where they hold it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
#: `jax.checkpoint` in a jaxpr.
CHECKPOINTS = ("checkpoint", "remat", "remat2")


class _Alias:
    """Stands where a primitive does: another name for a value, or an array of a number."""

    name = "alias"

    def __repr__(self) -> str:
        return "alias"


ALIAS = _Alias()


@dataclass(frozen=True, slots=True)
class Constant:
    """An operand that is a number known from the start."""

    value: Any
    aval: Any


#: What an operation reads: a value by its number, or a constant.
Operand = int | Constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation: a primitive, its parameters, what it reads and the numbers of the values that it makes.

    `scope`: the named scopes in which it stands, with `/` between them; `context`, JAX's, in which it must be
    executed again."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    scope: str
    context: Any
    region: int = -1

    @property
    def read(self) -> list[int]:
        """The values that it reads."""
        return [one for one in self.inputs if isinstance(one, int)]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Operations that are executed `depth` times: `carry`, the values before the first operation and what
    each is after the last; `rows`, the values of which each repetition has its own, and the stacked array of
    each."""

    depth: int
    carry: dict[int, int]
    rows: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A function as a list of operations.

    Values have numbers; those below `len(signature.dynamic)` are the arguments' dynamic leaves, the next
    `len(captured)` the arrays that the function closes over. `avals`, the type of every value; `outputs`, the
    function's results, the loss first; `out_tree`, how they are put together."""

    signature: Signature
    captured: tuple[Any, ...]
    steps: tuple[Step, ...]
    avals: tuple[Any, ...]
    outputs: tuple[Operand, ...]
    out_tree: Any
    regions: tuple[Region, ...] = ()

    @property
    def sources(self) -> int:
        """How many values are arguments or captured."""
        return len(self.signature.dynamic) + len(self.captured)

    def nbytes(self, value: int) -> int:
        """Bytes of a value."""
        return self._sizes[value]

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [trees.nbytes(aval) for aval in self.avals]


@dataclass
class Flat:
    """Collects operations; `keep`, the calls that stay whole; `avals`, the types of all values so far."""

    keep: frozenset[str]
    avals: list[Any] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    captured: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def value(self, aval: Any) -> int:
        """The number of a new value."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, value: Any) -> Operand:
        """What a program closes over: a number, or an array that becomes an argument."""
        if isinstance(value, jax.core.Tracer):
            raise ArgumentError(
                "the function closes over a value that is being traced: call this outside `jax.jit`, "
                "`jax.grad` and `jax.vmap`"
            )
        if np.ndim(value) == 0 and not trees.is_key(value):
            return Constant(value, jax.typeof(value))
        if id(value) not in self.captured:
            self.captured[id(value)] = self.value(jax.typeof(value)), value
        return self.captured[id(value)][0]

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Operand], scope: str) -> list[Operand]:
        """Takes the operations of `jaxpr` in, and returns its results."""
        env: dict[Any, Operand] = dict(zip(jaxpr.constvars, map(self.constant, consts)))
        env.update(zip(jaxpr.invars, args))

        def read(var: Any) -> Operand:
            return Constant(var.val, var.aval) if isinstance(var, Literal) else env[var]

        for eqn in jaxpr.eqns:
            where = "/".join(filter(None, (scope, _plain(str(eqn.source_info.name_stack)))))
            inputs = [read(var) for var in eqn.invars]
            inner = self.opened(eqn)
            if inner is not None:
                env.update(zip(eqn.outvars, self.walk(inner.jaxpr, inner.consts, inputs, where)))
                continue
            outputs = tuple(self.value(var.aval) for var in eqn.outvars)
            self.steps.append(
                Step(
                    primitive=eqn.primitive, params=eqn.params, inputs=tuple(inputs),
                    outputs=outputs, scope=where, context=eqn.ctx,
                )
            )  # fmt: skip
            env.update(zip(eqn.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def opened(self, eqn: Any) -> ClosedJaxpr | None:
        """The program that a call only calls, unless it says more than that: a sharding of its arguments, a
        policy that is kept."""
        name = eqn.primitive.name
        if name in CHECKPOINTS and name not in self.keep:
            return ClosedJaxpr(eqn.params["jaxpr"], ())
        if name not in CALLS or name in self.keep:
            return None
        shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
        if any(type(one).__name__ != "UnspecifiedValue" for one in shardings):
            return None
        inner = eqn.params[CALLS[name]]
        return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def trace(
    loss: Callable[..., Any], params: PyTree, args: tuple[Any, ...], *, has_aux: bool, keep_checkpoints: bool
) -> Traced:
    """The operations of `loss(params, *args)`.

    **Raises:** `ArgumentError` for a loss that is not a real scalar, for side effects, and
    where tracing fails because Python branches on values."""
    if not callable(loss):
        raise ArgumentError(
            f"`loss` is a {type(loss).__name__}, which is not callable: give `loss(params, *args)`"
        )
    signature = Signature.of(params, args)
    out_tree: list[Any] = []
    lost: list[str] = []

    def flat(*arrays: Any) -> list[Any]:
        params, args = signature.arguments(arrays)
        value, aux = _result(loss(params, *args), has_aux)
        value = value + 0 if any(value is one for one in arrays) else value  # an operation makes it
        leaves, treedef = jax.tree.flatten((value, aux))
        out_tree[:] = [treedef]
        lost[:] = signature.lost((params, args), arrays, leaves)
        return leaves

    try:
        closed = jax.make_jaxpr(flat)(*(traceable(aval) for aval in signature.avals))
    except jax.errors.ConcretizationTypeError as error:
        raise ArgumentError(
            "`loss` cannot be traced, because Python needs a value that is only known when it runs (a "
            "branch, a loop, `int(...)`, "
            f"NumPy): write it with `jax.lax.cond`, `jnp.where` or `jax.lax` loops. JAX says: {error}"
        ) from error
    warn_if_lost(lost)
    _check_scalar(closed.out_avals[0])
    check_effects(closed.jaxpr)
    collected = Flat(frozenset(CHECKPOINTS if keep_checkpoints else ()))
    given: list[Operand] = [collected.value(aval) for aval in closed.in_avals]
    outputs = collected.walk(closed.jaxpr, closed.consts, given, "")
    return _numbered(signature, collected, outputs, out_tree[0])


def _numbered(signature: Signature, flat: Flat, outputs: list[Operand], out_tree: Any) -> Traced:
    """What was collected, without what no result needs, and with what is captured numbered right after the
    arguments."""
    steps = needed(flat.steps, outputs)
    used = {value for step in steps for value in step.read} | {v for v in outputs if isinstance(v, int)}
    captured = [(number, array) for number, array in flat.captured.values() if number in used]
    first = len(signature.dynamic)
    order = [*range(first), *(number for number, _ in captured), *(v for step in steps for v in step.outputs)]
    new = {old: i for i, old in enumerate(order)}

    def rename(one: Operand) -> Operand:
        return new[one] if isinstance(one, int) else one

    renamed = tuple(
        replace(step, inputs=tuple(map(rename, step.inputs)), outputs=tuple(new[v] for v in step.outputs))
        for step in steps
    )
    return Traced(
        signature=signature,
        captured=tuple(array for _, array in captured),
        steps=renamed,
        avals=tuple(flat.avals[old] for old in order),
        outputs=tuple(map(rename, outputs)),
        out_tree=out_tree,
    )


def needed(steps: Sequence[Step], outputs: Iterable[Operand], regions: Sequence[Region] = ()) -> list[Step]:
    """The steps on which the outputs depend, in order."""
    stacked = {row: value for region in regions for row, value in region.rows.items()}
    wanted = {one for one in outputs if isinstance(one, int)}
    wanted.update(v for region in regions for v in (*region.carry, *region.carry.values()))
    kept = []
    for step in reversed(steps):
        if not wanted.isdisjoint(step.outputs):
            kept.append(step)
            wanted.update(stacked.get(v, v) for v in step.read)
    return kept[::-1]


#: What a transformation makes of a scope's name.
_TRANSFORMED = re.compile(r"\b(?:vmap|jvp|transpose|checkpoint|rematted_computation)\(([^()]*)\)")


def _plain(scope: str) -> str:
    """A name stack without the transformations, and the formulas of `jnp.einsum`, that it names."""
    while (shorter := _TRANSFORMED.sub(r"\1", scope)) != scope:
        scope = shorter
    return "/".join(name for name in scope.split("/") if name and "->" not in name)


def _result(value: Any, has_aux: bool) -> tuple[Any, Any]:
    """`(loss, aux)` of what the function returned."""
    if not has_aux:
        if len(jax.tree.leaves(value)) != 1 or not jax.tree_util.all_leaves([value]):
            raise ArgumentError(
                f"`loss` returned {_described(value)}, and must return one scalar: with more, use "
                "`has_aux=True` and return "
                "`(loss, anything)`"
            )
        return value, ()
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentError(
            f"`loss` returned {_described(value)}, and with `has_aux=True` it must return a pair, `(loss, "
            "anything)`"
        )
    return value[0], value[1]


def _check_scalar(aval: Any) -> None:
    if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        raise ArgumentError(
            f"`loss` returned {aval.dtype}{list(aval.shape)}, and a gradient is taken of a real scalar: take "
            "a mean or a sum, "
            "of complex numbers the real part or the absolute value"
        )


def _described(value: Any) -> str:
    leaves = [
        f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
        for leaf in jax.tree.leaves(value)
    ]
    shown = ", ".join([*leaves[:4], *(["..."] if leaves[4:] else [])])
    return f"a {type(value).__name__} of {len(leaves)} leaves ({shown})"


def programs(params: Any) -> Iterator[Jaxpr]:
    """The programs in an operation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def check_effects(jaxpr: Jaxpr) -> None:
    """Raises `ArgumentError` for side effects, wherever they stand. `jax.pure_callback` has none: JAX, too,
    may call it twice, or not at all."""
    waiting = [jaxpr]
    while waiting:
        for eqn in waiting.pop().eqns:
            name = eqn.primitive.name
            if ("callback" in name and name != "pure_callback") or name in (
                "infeed",
                "outfeed",
                "debug_print",
            ):
                raise ArgumentError(
                    f"`loss` calls `{name}`: a planned step may execute a part of it twice or in another "
                    "order, and has no place for "
                    "side effects (`jax.debug.print`, `io_callback`): return what you want to see with "
                    "`has_aux=True`; what has none may be a `jax.pure_callback`"
                )
            waiting += programs(eqn.params)
    if jaxpr.effects:
        raise ArgumentError(
            f"`loss` has side effects ({', '.join(map(str, itertools.islice(jaxpr.effects, 3)))}), which a "
            "planned step cannot have: "
            "return what changes with `has_aux=True`"
        )
