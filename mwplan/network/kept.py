"""A layer's forward and backward pass as one program, divided wherever one likes: what is kept is any set of
the values in between.

The program is that of the layer's `jax.vjp`, as a list of equations (calls are inlined). Those that read no
cotangent can be done forward. `KeepStore` does them there, keeps the values that its name says, and does
again in the backward pass what else that needs; what it computes is what `jax.vjp` does, by the same
equations.

**Names.** `keep:TRACE:VALUES`. `VALUES` are numbers of values in the order in which the program gives them;
`TRACE` is a digest of its forward part, without which the numbers mean nothing. Both come of the layer's
code, the shapes of its arrays, and JAX's version, and of nothing else: a schedule with such a name can be
written to a file, and another process, on another machine, finds the same.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from mwplan.common import trees
from mwplan.network import rules
from mwplan.network.canonical import CALLS, bind
from mwplan.network.residuals import remembered

PyTree = Any
#: How names of sets of values begin.
PREFIX = "keep:"
#: Primitives that only call what they hold, and that are seen through. Not `jax.checkpoint`, by which a layer
#: says itself what it makes again, and not `layers.bilinear`, a product.
_CALLS = {**CALLS, "core_call": "call_jaxpr"}
del _CALLS["bilinear"]
#: Primitives that cost nothing: what they read need not be kept from merging.
_FREE = {
    *("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient", "copy", "iota", "transpose"),
    *("pvary", "pcast"),
}
#: Primitives that there are within `jax.shard_map` alone, and that change nothing: their results have no
#: numbers.
_CASTS = {"pvary", "pcast"}


@dataclass(frozen=True)
class Divided:
    """The two programs of one choice of kept values.

    **Attributes:** `forward`, from the layer's arrays and the input's to the output's leaves and the kept
    values; `backward`, from the layer's arrays, the input's leaves `reads`, the kept values and the cotangent
    to the gradients of the parameters and the input's cotangent; `again`, whether it does equations of the
    forward pass again, `tied`: which of its arguments these read."""

    forward: ClosedJaxpr
    backward: ClosedJaxpr
    reads: tuple[int, ...]
    again: bool
    tied: tuple[int, ...]


class Joint:
    """A layer's forward and backward pass as one program.

    **Attributes:** `program`: from the leaves of the layer, of its input and of the output's cotangent that
    are arrays, to the leaves of the output, of the parameters' gradients and of the input's cotangent that
    have memory; `counts`, of each of these six; `values`, the variables of the forward part, in order, by
    whose numbers sets of kept values are named; `before`, the equations that make them, `after`, the
    others."""

    def __init__(self, layer: PyTree, x: PyTree) -> None:
        leaves, treedef = jax.tree.flatten((layer, x))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        inputs = [leaf for leaf in jax.tree.leaves(x) if _is_array(leaf)]
        y = jax.eval_shape(lambda *given: _applied(treedef, leaves, given), *arrays)
        ct = [leaf for leaf in jax.tree.leaves(y) if trees.is_inexact(leaf)]

        shapes_of_ct: list[Any] = []

        def joint(given: list[Any], ct: list[Any]) -> list[list[Any]]:
            layer, x = jax.tree.unflatten(treedef, _filled(leaves, given))
            y, pull = rules.value_and_vjp(layer, x)
            some = iter(ct)
            whole = [
                next(some) if trees.is_inexact(leaf) else trees.no_cotangent(leaf)
                for leaf in jax.tree.leaves(y)
            ]
            params, ct_in = pull(jax.tree.unflatten(jax.tree.structure(y), whole))
            solid = [leaf for leaf in jax.tree.leaves(ct_in) if not trees.is_float0(leaf)]
            shapes_of_ct[:] = [trees.struct(ct_in)]
            return [jax.tree.leaves(y), list(params), solid]

        traced, shapes = jax.make_jaxpr(joint, return_shape=True)(arrays, ct)
        self.program = _flat(traced)
        self.counts = (len(arrays) - len(inputs), len(inputs), len(ct), *map(len, shapes))
        self.output, self.cotangent = jax.tree.structure(y), shapes_of_ct[0]
        self._find()

    def __eq__(self, other: object) -> bool:
        """Whether the two are the same program: within one process a layer may be traced more than once."""
        return self is other or (
            isinstance(other, Joint)
            and (self.digest, self.counts, self.output, len(self.program.consts))
            == (other.digest, other.counts, other.output, len(other.program.consts))
            and all(a is b for a, b in zip(self.program.consts, other.program.consts))
            and all(a.params == b.params for a, b in zip(self.program.jaxpr.eqns, other.program.jaxpr.eqns))
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def _find(self) -> None:
        """Which equations read no cotangent, and their results."""
        jaxpr = self.program.jaxpr
        late = {*jaxpr.invars[sum(self.counts[:2]) :]}
        self.early: list[bool] = []
        self.values: list[Any] = []
        self.before: list[Any] = []
        self.after: list[Any] = []
        for eqn in jaxpr.eqns:
            after = any(not isinstance(var, Literal) and var in late for var in eqn.invars)
            self.early.append(not after)
            (self.after if after else self.before).append(eqn)
            if after:
                late.update(eqn.outvars)
            elif eqn.primitive.name not in _CASTS:
                self.values += eqn.outvars
        self.number = {var: i for i, var in enumerate(self.values)}
        self.digest = _digest([*jaxpr.constvars, *jaxpr.invars], self.before)
        self.divide = functools.cache(self._divide)

    @property
    def y(self) -> Sequence[Any]:
        """The output's variables."""
        found: Sequence[Any] = self.program.jaxpr.outvars[: self.counts[3]]
        return found

    @property
    def late(self) -> Sequence[Any]:
        """Those of the gradients and the input's cotangent."""
        found: Sequence[Any] = self.program.jaxpr.outvars[self.counts[3] :]
        return found

    @property
    def inputs(self) -> Sequence[Any]:
        """The input's."""
        found: Sequence[Any] = self.program.jaxpr.invars[self.counts[0] : sum(self.counts[:2])]
        return found

    @property
    def needed(self) -> list[Any]:
        """The variables of input and forward part that the backward part reads, or gives as they are."""
        read = [var for eqn in self._part([], self.late, self.values, late=True).eqns for var in eqn.invars]
        known = {*self.inputs, *self.values}
        return [var for var in dict.fromkeys(_solid([*read, *self.late])) if var in known]

    def wanted(self, kept: Sequence[int]) -> tuple[int, ...]:
        """Of these values those that the backward pass reads where they are kept."""
        part = self._part([], self.late, [self.values[i] for i in kept], late=True)
        read = {*_solid([var for eqn in part.eqns for var in eqn.invars]), *_solid(self.late)}
        return tuple(sorted(i for i in {*kept} if self.values[i] in read))

    @property
    def foreign(self) -> list[Any]:
        """Of the arrays that the layer has from elsewhere, those that are being traced."""
        return [const for const in self.program.consts if isinstance(const, jax.core.Tracer)]

    def with_foreign(self, program: ClosedJaxpr, foreign: Sequence[Any]) -> ClosedJaxpr:
        """A part of the program with these in their place."""
        some = iter(foreign)
        consts = [next(some) if isinstance(c, jax.core.Tracer) else c for c in program.consts]
        return ClosedJaxpr(program.jaxpr, consts)

    def name(self, kept: Sequence[int]) -> str:
        """That of a set of kept values."""
        return f"{PREFIX}{self.digest}:{'.'.join(map(str, sorted(kept)))}"

    def _divide(self, kept: tuple[int, ...]) -> Divided:
        """The two programs where the values `kept` are kept."""
        jaxpr = self.program.jaxpr
        variables = [self.values[i] for i in kept]
        first = sum(self.counts[:2])
        forward = self._part(jaxpr.invars[:first], [*self.y, *variables], (), late=False)
        free = (jaxpr.invars[: self.counts[0]], jaxpr.invars[first:])
        whole = self._part([*free[0], *self.inputs, *variables, *free[1]], self.late, variables, late=True)
        before = {id(eqn) for eqn in self.before}
        again = [eqn for eqn in whole.eqns if id(eqn) in before]
        read = {*_solid([*(var for eqn in whole.eqns for var in eqn.invars), *whole.outvars])}
        reads = tuple(i for i, var in enumerate(self.inputs) if var in read)
        whole = whole.replace(invars=[*free[0], *(self.inputs[i] for i in reads), *variables, *free[1]])
        work = [eqn for eqn in again if eqn.primitive.name not in _FREE]
        behind = {*_solid([var for eqn in again for var in eqn.invars])}
        tied = tuple(i for i, var in enumerate(whole.invars) if var in behind)
        consts = self.program.consts
        return Divided(
            ClosedJaxpr(forward, consts), ClosedJaxpr(whole, consts), reads, bool(work), tied if work else ()
        )

    def _part(self, given: Sequence[Any], wanted: Sequence[Any], stop: Sequence[Any], *, late: bool) -> Jaxpr:
        """The part of the program that `wanted` comes from, back to `given` and `stop`."""
        jaxpr = self.program.jaxpr
        need = {*_solid(wanted)} - {*stop}
        found = []
        for eqn, early in reversed(list(zip(jaxpr.eqns, self.early, strict=True))):
            if need.isdisjoint(eqn.outvars) or not (early or late):
                continue
            found.append(eqn)
            need.update(_solid(eqn.invars))
            need -= {*stop}
        part: Jaxpr = jaxpr.replace(invars=list(given), outvars=list(wanted), eqns=found[::-1])
        return part


def _solid(variables: Sequence[Any]) -> list[Any]:
    """Those that are variables, not numbers."""
    return [var for var in variables if not isinstance(var, Literal)]


def _is_array(leaf: Any) -> bool:
    return trees.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _filled(leaves: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """`leaves` with `given` for those that are arrays."""
    some = iter(given)
    return [next(some) if _is_array(leaf) else leaf for leaf in leaves]


def _applied(treedef: Any, leaves: Sequence[Any], given: Sequence[Any]) -> PyTree:
    layer, x = jax.tree.unflatten(treedef, _filled(leaves, given))
    return layer(x)


def _flat(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program without calls."""

    def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if isinstance(inner, ClosedJaxpr):
                out = run(inner.jaxpr, inner.consts, values)
            else:
                out = bind(eqn, values)
            env.update(zip(eqn.outvars, out, strict=True))
        return [read(var) for var in jaxpr.outvars]

    flat: ClosedJaxpr = jax.make_jaxpr(lambda *args: run(closed.jaxpr, closed.consts, args))(*closed.in_avals)
    return flat


def _digest(given: Sequence[Any], eqns: Sequence[Any]) -> str:
    """Of a program's equations: which primitive reads what, and the shapes and types of what it gives."""
    count = itertools.count()
    names: dict[Any, str] = {var: str(next(count)) for var in given}

    def kind(var: Any) -> str:
        return f"{getattr(var.aval, 'dtype', '')}{list(getattr(var.aval, 'shape', ()))}"

    lines = [",".join(map(kind, given))]
    for eqn in eqns:
        read = [f"={var.val}" if isinstance(var, Literal) else names[var] for var in eqn.invars]
        if eqn.primitive.name in _CASTS:
            names.update(zip(eqn.outvars, read))
            continue
        names.update((var, str(next(count))) for var in eqn.outvars)
        lines.append(f"{eqn.primitive.name} {','.join(read)} {','.join(map(kind, eqn.outvars))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


@remembered
def _cell(treedef: Any, kinds: tuple[Any, ...], more: tuple[Any, ...]) -> list[Joint]:
    """Where the program for arguments of these kinds is remembered."""
    return []


def joint(layer: PyTree, x: PyTree) -> Joint:
    """The forward and backward pass of `layer` at `x` (arrays or shapes) as one program. **Cost:** three
    traces of the layer, once for each structure of the arguments."""
    leaves, treedef = jax.tree.flatten((layer, x))
    kinds = _kinds(leaves)
    others = tuple(leaf for leaf in leaves if not _is_array(leaf))
    try:
        # Types tell 1 from 1.0 and True; with `jax_enable_x64` numbers are of other precision.
        cell = _cell(treedef, (kinds, others), (*map(type, others), jnp.result_type(float)))
    except TypeError:  # a part that cannot be hashed
        cell = []
    if cell:
        known: Joint = cell[0]
        return known
    found = Joint(*jax.tree.unflatten(treedef, _filled(leaves, kinds)))
    if not found.foreign:  # what is traced now will not be there later
        cell.append(found)
    return found


def _kinds(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The shapes and types of those that are arrays, and the axes along which they vary within
    `jax.shard_map`."""
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    concrete = [leaf for leaf in arrays if not isinstance(leaf, jax.ShapeDtypeStruct)]
    shapes = iter(jax.eval_shape(lambda: concrete))
    return tuple(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else next(shapes) for leaf in arrays)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """What `KeepStore` keeps: leaves of the input, values, arrays of the program's own that are being traced;
    and of which program."""

    inputs: list[Any]
    values: list[Any]
    foreign: list[Any]
    joint: Joint = field(metadata={"static": True})


@dataclass(frozen=True)
class KeepStore(rules.StoreRule):
    """Keeps the values of the joint program that `name` says, and makes again what else the backward pass
    needs.

    **Residuals:** those values, and the input's leaves from which something is made again or that the
    backward pass reads. A barrier keeps what is made again from being merged with what it was, and from
    beginning before the cotangent is there, as that of `jax.checkpoint` does; on TPUs, where nothing waits
    for barriers, what it is made from depends on the cotangent.
    """

    name: str

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the values."""
        numbers = self.name.rpartition(":")[2]
        return tuple(int(number) for number in numbers.split(".") if number)

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, Held]:
        """The output; the input's leaves and the values that are kept."""
        whole = joint(layer, x)
        divided = whole.divide(self.kept)
        inputs = _arrays(x)
        out = jaxpr_as_fun(divided.forward)(*_arrays(layer), *inputs)
        count = whole.counts[3]
        held = Held([inputs[i] for i in divided.reads], list(out[count:]), whole.foreign, whole)
        return jax.tree.unflatten(whole.output, out[:count]), held

    def backward(self, layer: PyTree, residuals: Held, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """The gradients of the parameters, and the input's cotangent."""
        whole = residuals.joint
        divided = whole.divide(self.kept)
        ct = [leaf for leaf in jax.tree.leaves(ct_out) if trees.is_inexact(leaf)]
        given = [*_arrays(layer), *residuals.inputs, *residuals.values]
        if divided.again:
            behind, ct = trees.tie(([given[i] for i in divided.tied], ct))
            for i, leaf in zip(divided.tied, trees.after(behind, ct), strict=True):
                given[i] = leaf
        out = jaxpr_as_fun(whole.with_foreign(divided.backward, residuals.foreign))(*given, *ct)
        grads, rest = list(out[: whole.counts[4]]), iter(out[whole.counts[4] :])
        ct_in = jax.tree.map(
            lambda leaf: trees.no_cotangent(leaf) if trees.is_float0(leaf) else next(rest), whole.cotangent
        )
        return grads, ct_in


def store_rules(layer: PyTree, x: PyTree, name: str) -> tuple[rules.StoreRule, ...]:
    """`rules.store_rules`, and the rule of that `name` where it is one of `rules.SMALLER` or a set of values
    of this layer's program at `x`."""
    offered = rules.store_rules(layer, x)
    if not name.startswith(PREFIX):
        # Layers with rules of their own may do with less than these keep, too.
        return (*offered, *(rule for rule in rules.SMALLER if rule.name == name and rule not in offered))
    rule, whole = KeepStore(name), joint(layer, x)
    fits = name == whole.name(rule.kept) and max(rule.kept, default=-1) < len(whole.values)
    return (*offered, rule) if fits else offered


def applied(layer: PyTree, x: PyTree, name: str) -> PyTree:
    """`layer(x)`, of which the derivative keeps what the rule of that `name` keeps."""
    rule = KeepStore(name)
    leaves, treedef = jax.tree.flatten(layer)
    where = [i for i, leaf in enumerate(leaves) if _is_array(leaf) and not trees.is_inexact(leaf)]

    def whole(params: list[Any], others: list[Any]) -> PyTree:
        # Arguments, all of them: they may be traced, and a `jax.custom_vjp` must not close over such.
        mine = dict(zip(where, others, strict=True))
        one = jax.tree.unflatten(treedef, [mine.get(i, leaf) for i, leaf in enumerate(leaves)])
        return trees.with_parameters(one, params)

    @jax.custom_vjp
    def call(params: list[Any], others: list[Any], x: PyTree) -> PyTree:
        return whole(params, others)(x)

    def forward(params: list[Any], others: list[Any], x: PyTree) -> tuple[PyTree, Any]:
        y, held = rule.forward(whole(params, others), x)
        return y, (params, others, held)

    def backward(kept: Any, ct_out: PyTree) -> tuple[list[Any], None, PyTree]:
        params, others, held = kept
        grads, ct_in = rule.backward(whole(params, others), held, ct_out)
        return grads, None, ct_in

    call.defvjp(forward, backward)
    return call(trees.parameters(layer), [leaves[i] for i in where], x)


def _arrays(tree: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]
