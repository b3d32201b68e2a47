r"""Which sets of values a layer may keep: the trades of bytes against time that a plan may want, few and far
between.

From the layer's joint program (`mwplan.network.kept`) and the figures of a device:

1. **Candidates** are all minimum cuts between what the forward pass gives and what the backward pass needs
   (`mwplan.solvers.minimum_cuts`), and the sets that users and `jax.checkpoint`'s policies name: each name
   that `jax.ad_checkpoint.checkpoint_name` gives in the layer, all of them, products, products without batch
   axes.
2. **Times.** A value that is kept costs the time to write it, unless the forward pass writes it anyway, and
   to read it. An operation that is done again costs its kernel, if it is one of its own (products,
   convolutions, loops, what is not known). What is elementwise is computed in registers by whatever reads it,
   and costs its arithmetic, unless a kernel reads it that computes nothing on the way, such as a product:
   then it is written first. A reduction costs what it reads; on a GPU, whose compiler does a row's
   reductions and what is made of them in one kernel (softmax, norms), only its arithmetic and a launch, but
   keeping a value from the midst of such a kernel makes it two.
3. **Few.** What no budget would use is dropped, and so is what saves less than a quarter of an activation; of
   what remains those that matter most to the staircase, `MOST` at most (on TPUs `MOST_ON_TPUS`), the one
   that keeps least, and the one that takes least in all while its layer is differentiated.

Bits count an eighth of a byte: masks are packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from mwplan.common import trees
from mwplan.network import operations, rules
from mwplan.network.axes import WithAxes
from mwplan.network.kept import Joint, KeepStore, joint
from mwplan.profiling import costs, programs
from mwplan.targets.devices import Device, GpuChip, TpuChip

PyTree = Any
#: Sets of kept values that a layer offers at most: each has two programs to be compiled.
MOST = 5
#: The same where each program takes a compiler ten to twenty seconds, as TPUs' does.
MOST_ON_TPUS = 3
#: Of an activation: what a set must save more than the next.
LEAST_SAVED = 0.25
#: Of that: what the set of the fewest bytes must save, so that a plan fits wherever `jax.checkpoint` on every
#: layer does.
LAST_SAVED = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """A set of kept values: `nbytes`, of them and of the input where it is kept; `time_ns`, to keep them and
    to make the rest again; `workspace_bytes`, of the backward pass."""

    kept: tuple[int, ...]
    nbytes: int
    time_ns: float
    workspace_bytes: int


def store_rules(
    layer: PyTree, x: PyTree, device: Device, *, below: int | None
) -> tuple[rules.StoreRule, ...]:
    """The sets of values that `layer` at `x` (arrays or shapes) may keep, as rules, from the fewest bytes to
    the least time; `below`: the bytes of the least that it keeps by rules of its own; None: all of these pack
    masks, and sets without masks are wanted however large they are.

    `rules.SMALLER` where they keep the same. **Cost:** some traces of the layer and tens of milliseconds for
    a block of a hundred equations, once for each structure."""
    if isinstance(layer, WithAxes):  # in a step its program is another
        return tuple(rule for rule in operations.store_rules(layer, x) if rule in rules.SMALLER)
    whole = joint(layer, x)
    if whole.program.jaxpr.effects:
        return ()
    step = LEAST_SAVED * max(_nbytes(whole.inputs), _nbytes(whole.y))
    problem = Problem(whole, device)
    found = [problem.trade(kept) for kept in candidates(problem)]
    if below is None:
        found = [one for one in found if not any(whole.values[i].aval.dtype == bool for i in one.kept)]
        below = 1 << 62
    products = whole.wanted(_named(whole)[-1])
    # `jax.checkpoint` cannot keep complex numbers.
    plain = not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in whole.values)
    known = {products: rules.SMALLER[0], (): rules.SMALLER[1]} if plain else {}
    most = MOST_ON_TPUS if isinstance(device.chip, TpuChip) else MOST
    return tuple(
        known.get(one.kept) or KeepStore(whole.name(one.kept))
        for one in thinned(found, below=below, step=step, most=most)
    )


def thinned(found: Sequence[Trade], *, below: int, step: float, most: int = MOST) -> list[Trade]:
    """Of the Pareto set those that save `step` bytes or more, against `below` and one another: `most` that
    change the staircase of time against bytes most, with the last of it; that which keeps least, and that
    which needs least while it is made again."""
    stairs: list[Trade] = []
    for one in sorted(found, key=lambda one: (one.time_ns, one.nbytes, one.workspace_bytes)):
        last = stairs[-1].nbytes if stairs else below
        if one.nbytes + step <= last:
            stairs.append(one)
    while len(stairs) > most:
        lost = [
            (stairs[i + 1].time_ns - stairs[i].time_ns)
            * ((stairs[i - 1].nbytes if i else below) - one.nbytes)
            for i, one in enumerate(stairs[:-1])
        ]
        del stairs[min(range(len(lost)), key=lost.__getitem__)]
    least = min(found, key=lambda one: (one.nbytes, one.time_ns))
    if least.nbytes + LAST_SAVED * step < (stairs[-1].nbytes if stairs else below):
        stairs.append(least)
    if stairs:
        leanest = min(found, key=lambda one: (one.nbytes + one.workspace_bytes, one.time_ns))
        needed = stairs[-1].nbytes + stairs[-1].workspace_bytes
        if leanest.nbytes + leanest.workspace_bytes + step <= needed:
            stairs.append(leanest)
    return list(dict.fromkeys(stairs))[::-1]


def _nbytes(variables: Iterable[Any]) -> int:
    return trees.nbytes([variable.aval for variable in variables])


def _kept_bytes(variable: Any) -> int:
    """What a value takes while it is kept."""
    size = trees.nbytes(variable.aval)
    return -(-size // 8) if variable.aval.dtype == bool else size


# -- candidates


def candidates(problem: Problem) -> list[tuple[int, ...]]:
    """Minimum cuts, and what names and `jax.checkpoint`'s policies would keep: sets of the numbers of
    values."""
    from mwplan.solvers import minimum_cuts  # loads OR-tools

    joint, given = problem.joint, len(problem.joint.inputs)
    cuts = minimum_cuts.hull(problem.values, problem.operations)
    found = [tuple(v - given for v in cut.kept if v >= given) for cut in cuts]
    found += [joint.wanted(kept) for kept in _named(joint)]
    return list(dict.fromkeys(found))


def _named(joint: Joint) -> list[list[int]]:
    """None; the values of each name, those of all names, of products, and of those without batch axes."""
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


class Problem:
    """A joint program as a problem of `mwplan.solvers.minimum_cuts`: `values` are the input's leaves, and
    then those of the program in its order; `operations`, the equations of the forward part."""

    def __init__(self, joint: Joint, device: Device) -> None:
        from mwplan.solvers.minimum_cuts import Operation, Value

        self.joint, self.device = joint, device
        self.place = {var: i for i, var in enumerate([*joint.inputs, *joint.values])}
        self.alone = {var for eqn in joint.before if _apart(eqn) for var in eqn.outvars}
        made = {var for var in joint.y if not isinstance(var, Literal)}  # an output may be a number
        self.written = {*self.alone, *_read_apart(joint.before), *made}
        self.broken = _broken(joint.before) if isinstance(device.chip, GpuChip) else {}
        outer, needed = _read_apart(joint.after), {*joint.needed}
        makers = {var: e for e, eqn in enumerate(joint.before) for var in eqn.outvars}
        self.values = [
            Value(
                nbytes=0 if var in made else _kept_bytes(var),
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

    def trade(self, kept: tuple[int, ...]) -> Trade:
        """What a set of the program's values costs."""
        there = {i + len(self.joint.inputs) for i in kept}
        again: set[int] = set()
        held = {*there}
        stack = [v for v, value in enumerate(self.values) if value.needed]
        while stack:
            v = stack.pop()
            maker = self.values[v].maker
            if maker is None:
                held.add(v)
            elif v not in there and maker not in again:
                again.add(maker)
                stack += self.operations[maker].reads
        program = programs.graph(self.joint.divide(kept).backward)
        return Trade(
            kept=kept,
            nbytes=sum(self.values[v].nbytes for v in held),
            time_ns=sum(self.values[v].keep_ns for v in there)
            + sum(self.operations[e].time_ns for e in again),
            workspace_bytes=costs.workspace(program, costs.kernels(program)),
        )

    def _write_ns(self, variable: Any) -> float:
        return 0.0 if variable in self.alone else self.device.traffic_ns(trees.nbytes(variable.aval))

    def _keep_ns(self, variable: Any) -> float:
        """To write it, unless that is done anyway, and to read it."""
        moved = _kept_bytes(variable)
        if variable not in self.written:
            moved += moved + self.broken.get(variable, 0)
        return self.device.traffic_ns(moved)

    def _again_ns(self, eqn: Any) -> float:
        """To do an equation again where what it reads is there, in registers at least."""
        if _apart(eqn):
            inputs = list(dict.fromkeys(_variables(eqn)))
            alone = self.joint.program.jaxpr.replace(invars=inputs, outvars=list(eqn.outvars), eqns=[eqn])
            kernel = self.device.time_ns(costs.kernels(programs.graph(alone)))
            made = (v for v in inputs if v in self.place and v not in {*self.joint.inputs})
            return kernel + sum(map(self._write_ns, made))
        name = eqn.primitive.name
        if name in programs.VIEWS or not any(v in self.place for v in _variables(eqn)):
            return 0.0
        reduces = name in costs.REDUCTIONS
        size = sum(math.prod(v.aval.shape) for v in (_variables(eqn) if reduces else eqn.outvars))
        factor = costs.TRANSCENDENTAL if name in costs.TRANSCENDENTALS else 1
        time: float = self.device.arithmetic_ns({"float32": float(factor * size)})
        if reduces:
            time += self.device.launch_ns
        if reduces and not isinstance(self.device.chip, GpuChip):
            time += self.device.traffic_ns(sum(trees.nbytes(v.aval) for v in _variables(eqn)))
        return time


def _read_apart(eqns: Sequence[Any]) -> set[Any]:
    """What kernels of their own read, through views."""
    found: set[Any] = set()
    for eqn in reversed(eqns):
        if _apart(eqn) or (eqn.primitive.name in programs.VIEWS and eqn.outvars[0] in found):
            found.update(_variables(eqn))
    return found


def _broken(eqns: Sequence[Any]) -> dict[Any, int]:
    """For each value within a fused stretch that reduces something: the bytes that are moved once more where
    the stretch becomes two kernels."""
    home: dict[Any, int] = {}
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for eqn in eqns:
        if _apart(eqn):
            continue
        mine = len(parent)
        parent.append(mine)
        for var in _variables(eqn):
            if var in home:
                parent[find(home[var])] = mine
        home.update(dict.fromkeys(eqn.outvars, mine))
    largest: dict[int, int] = {}
    for eqn in eqns:
        if eqn.primitive.name in costs.REDUCTIONS:
            at = find(home[eqn.outvars[0]])
            largest[at] = max(largest.get(at, 0), *(trees.nbytes(v.aval) for v in _variables(eqn)))
    return {var: 2 * largest[find(at)] for var, at in home.items() if find(at) in largest}


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]


def _apart(eqn: Any) -> bool:
    """Whether an equation is a kernel of its own: neither elementwise nor moved data nor a reduction."""
    return eqn.primitive.name not in costs.FUSED and eqn.primitive.name not in programs.VIEWS
