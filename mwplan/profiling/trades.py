r"""Which sets of values a layer may keep: the trades of bytes against time that a plan may want, few and far
between.

From the layer's joint program (`mwplan.network.kept`) and the figures of a device:

1. **Candidates** are all minimum cuts between what the forward pass gives and what the backward pass needs
   (`mwplan.solvers.minimum_cuts`), and the sets that users and `jax.checkpoint`'s policies name: each name
   that `jax.ad_checkpoint.checkpoint_name` gives in the layer, all of them, products, products without batch
   axes.
2. **In the cuts** a value costs the time to write it, unless the forward pass writes it anyway, and to read
   it. An operation that is done again costs its kernel, if it is one of its own (products, convolutions,
   loops, what is not known), or what it reads, if it is a reduction. What is elementwise is computed in
   registers by whatever reads it, and costs next to nothing, unless a kernel reads it that computes nothing
   on the way, such as a product: then it is written first.
3. **Prices** of candidates are those of their two programs, kernel by kernel (`mwplan.profiling.costs`).
   What no budget would use is dropped, and so is what saves less than a quarter of an activation; of what
   remains those that matter most to the staircase, `MOST` at most, and the one that takes least in all while
   its layer is differentiated.

Bits count an eighth of a byte: masks are packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from mwplan.common import trees
from mwplan.network import operations, rules
from mwplan.network.axes import WithAxes
from mwplan.network.kept import Joint, KeepStore, joint
from mwplan.profiling import costs, programs
from mwplan.targets.devices import Device

PyTree = Any
#: Sets of kept values that a layer offers at most: each has two programs to be compiled.
MOST = 5
#: Of an activation: what a set must save more than the next.
LEAST_SAVED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """A set of kept values: `nbytes`, of them and of the input where it is kept; `time_ns`, of the forward
    and the backward pass; `workspace_bytes`, of the backward pass."""

    kept: tuple[int, ...]
    nbytes: int
    time_ns: float
    workspace_bytes: int


def store_rules(layer: PyTree, x: PyTree, device: Device, *, below: int) -> tuple[rules.StoreRule, ...]:
    """The sets of values that `layer` at `x` (arrays or shapes) may keep, as rules, from the fewest bytes to
    the least time; `below`: the bytes of the least that it keeps by rules of its own.

    `rules.SMALLER` where they keep the same. **Cost:** some traces of the layer and tens of milliseconds for
    a block of a hundred equations, once for each structure."""
    if isinstance(layer, WithAxes):  # in a step its program is another
        return tuple(rule for rule in operations.store_rules(layer, x) if rule in rules.SMALLER)
    whole = joint(layer, x)
    if whole.program.jaxpr.effects:
        return ()
    step = LEAST_SAVED * max(_nbytes(whole.inputs), _nbytes(whole.y))
    found = [_priced(whole, kept, device) for kept in candidates(whole, device)]
    products = whole.wanted(_named(whole)[-1])
    # `jax.checkpoint` cannot keep complex numbers.
    plain = not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in whole.values)
    known = {products: rules.SMALLER[0], (): rules.SMALLER[1]} if plain else {}
    return tuple(
        known.get(one.kept) or KeepStore(whole.name(one.kept))
        for one in thinned(found, below=below, step=step)
    )


def thinned(found: Sequence[Trade], *, below: int, step: float) -> list[Trade]:
    """Of the Pareto set those that save `step` bytes or more, against `below` and one another, `MOST` of
    them: that which needs least while it is made again, and of the others those that leave the staircase of
    time against bytes least changed."""
    stairs: list[Trade] = []
    for one in sorted(found, key=lambda one: (one.time_ns, one.nbytes, one.workspace_bytes)):
        last = stairs[-1].nbytes if stairs else below
        if one.nbytes + step <= last:
            stairs.append(one)
    while len(stairs) > MOST:
        lost = [
            (stairs[i + 1].time_ns - stairs[i].time_ns) * ((stairs[i - 1].nbytes if i else below) - one.nbytes)
            for i, one in enumerate(stairs[:-1])
        ]
        del stairs[min(range(len(lost)), key=lost.__getitem__)]
    if stairs:
        leanest = min(found, key=lambda one: (one.nbytes + one.workspace_bytes, one.time_ns))
        last = stairs[-1]
        if leanest.nbytes + leanest.workspace_bytes + step <= last.nbytes + last.workspace_bytes:
            stairs.append(leanest)
    return list(dict.fromkeys(stairs))[::-1]


def _nbytes(variables: Iterable[Any]) -> int:
    return trees.nbytes([variable.aval for variable in variables])


def _priced(joint: Joint, kept: tuple[int, ...], device: Device) -> Trade:
    """A set by its two programs."""
    divided = joint.divide(kept)
    time, workspace = 0.0, 0
    for closed in (divided.forward, divided.backward):
        program = programs.graph(closed)
        steps = costs.kernels(program)
        time += device.time_ns(steps)
        workspace = costs.workspace(program, steps)
    outputs = {*joint.y}
    nbytes = _nbytes(joint.inputs) if divided.reads else 0
    nbytes += sum(_kept_bytes(v) for v in (joint.values[i] for i in kept) if v not in outputs)
    return Trade(kept=kept, nbytes=nbytes, time_ns=time, workspace_bytes=workspace)


def _kept_bytes(variable: Any) -> int:
    """What a value takes while it is kept."""
    size = trees.nbytes(variable.aval)
    return -(-size // 8) if variable.aval.dtype == bool else size


# -- candidates


def candidates(joint: Joint, device: Device) -> list[tuple[int, ...]]:
    """Minimum cuts, and what names and `jax.checkpoint`'s policies would keep: sets of the numbers of
    values."""
    from mwplan.solvers import minimum_cuts  # loads OR-tools

    problem = _Problem(joint, device)
    cuts = minimum_cuts.hull(problem.values, problem.operations)
    given = len(joint.inputs)
    found = [tuple(v - given for v in cut.kept if v >= given) for cut in cuts]
    found += [joint.wanted(kept) for kept in _named(joint)]
    return list(dict.fromkeys(found))


def _named(joint: Joint) -> list[list[int]]:
    """The values of each name, those of all names, of products, and of those without batch axes; and none."""
    names: dict[str, list[int]] = {}
    products: list[int] = []
    unbatched: list[int] = []
    for eqn in joint.before:
        numbers = [joint.number[var] for var in eqn.outvars if var in joint.number]
        if eqn.primitive.name == "name":
            names.setdefault(eqn.params["name"], []).extend(numbers)
        if eqn.primitive.name in (*programs.PRODUCTS, "bilinear"):
            products += numbers
            if eqn.primitive.name != "dot_general" or not any(eqn.params["dimension_numbers"][1]):
                unbatched += numbers
    return [[], *names.values(), [i for some in names.values() for i in some], products, unbatched]


class _Problem:
    """A joint program as one of `mwplan.solvers.minimum_cuts`: values are the input's leaves, and then those
    of the program in its order; operations, the forward part's equations."""

    def __init__(self, joint: Joint, device: Device) -> None:
        from mwplan.solvers.minimum_cuts import Operation, Value

        self.joint, self.device = joint, device
        self.place = {var: i for i, var in enumerate([*joint.inputs, *joint.values])}
        self.alone = {var for eqn in joint.before if _apart(eqn) for var in eqn.outvars}
        self.outputs = {*joint.y}
        needed = {*joint.needed}
        inner, outer = self._read_apart(joint.before), self._read_apart(joint.after)
        self.written = {*self.alone, *inner, *self.outputs}
        makers = {var: e for e, eqn in enumerate(joint.before) for var in eqn.outvars}
        self.values = [
            Value(
                nbytes=0 if var in self.outputs else _kept_bytes(var),
                keep_ns=self._keep_ns(var) if var in makers else 0.0,
                maker=makers.get(var),
                needed=var in needed,
            )
            for var in self.place
        ]
        self.operations = [
            Operation(
                time_ns=self._again_ns(eqn) + sum(self._write_ns(v) for v in eqn.outvars if v in outer),
                reads=tuple(self.place[v] for v in _variables(eqn) if v in self.place),
                once=bool(eqn.effects),
            )
            for eqn in joint.before
        ]

    def _read_apart(self, eqns: Sequence[Any]) -> set[Any]:
        """What kernels of their own read, through views."""
        found: set[Any] = set()
        for eqn in reversed(eqns):
            if _apart(eqn) or (eqn.primitive.name in programs.VIEWS and eqn.outvars[0] in found):
                found.update(_variables(eqn))
        return found

    def _write_ns(self, variable: Any) -> float:
        return 0.0 if variable in self.alone else self.device.traffic_ns(trees.nbytes(variable.aval))

    def _keep_ns(self, variable: Any) -> float:
        """To write it, unless that is done anyway, and to read it."""
        once = self.device.traffic_ns(_kept_bytes(variable))
        return once if variable in self.written else 2 * once

    def _again_ns(self, eqn: Any) -> float:
        """To do an equation again where what it reads is there, in registers at least."""
        if _apart(eqn):
            inputs = list(dict.fromkeys(_variables(eqn)))
            alone = _alone(eqn, inputs)
            kernel = self.device.time_ns(costs.kernels(programs.graph(alone)))
            return kernel + sum(self._write_ns(v) for v in inputs if v in self.place and self._made(v))
        if eqn.primitive.name in costs.REDUCTIONS:
            read = sum(trees.nbytes(v.aval) for v in _variables(eqn))
            return self.device.launch_ns + self.device.traffic_ns(read)
        if eqn.primitive.name in programs.VIEWS or not any(v in self.place for v in _variables(eqn)):
            return 0.0
        factor = costs.TRANSCENDENTAL if eqn.primitive.name in costs.TRANSCENDENTALS else 1
        size = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        return self.device.arithmetic_ns({"float32": float(factor * size)})

    def _made(self, variable: Any) -> bool:
        """Whether a value is computed in registers."""
        return variable not in self.alone and variable not in {*self.joint.inputs}


def _alone(eqn: Any, inputs: Sequence[Any]) -> Jaxpr:
    """A program of one equation."""
    return Jaxpr(constvars=[], invars=list(inputs), outvars=list(eqn.outvars), eqns=[eqn])


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]


def _apart(eqn: Any) -> bool:
    """Whether an equation is a kernel of its own: neither elementwise nor moved data nor a reduction."""
    return eqn.primitive.name not in costs.FUSED and eqn.primitive.name not in programs.VIEWS
