"""From cuts to pieces: what each takes, what crosses the cuts, who holds the parameters."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mwplan.functions.finding import tiled, why_not
from mwplan.functions.flow import Flow
from mwplan.functions.kinds import ELEMENTWISE, SHAPES
from mwplan.functions.piece_chain import Group, PieceSpec, Plan
from mwplan.functions.pieces import BITS, PLAIN, STOPPED, held_as
from mwplan.functions.programs import Program, numbering
from mwplan.functions.recognition import Found
from mwplan.functions.scans import stacked_by
from mwplan.functions.stretches import Weight
from mwplan.functions.tracing import ALIAS, Step

#: Sources that so many pieces read, or more, cross the cuts between them; those of fewer are held by each of
#: these pieces. Those of layers that can be passed are held by more, if their gradients, which are added up
#: at the end, take no more than an activation that these layers take.
SHARED_BY = 3


class _Assembler:
    """Makes the pieces between `bounds`, positions in the flow's operations."""

    def __init__(self, flow: Flow, bounds: Sequence[int], found: Sequence[Found]) -> None:
        self.flow, self.bounds, self.found = flow, bounds, found
        self.count = len(bounds) - 1
        self.born, dies = flow.lifetimes()
        # Values, and the operations that make them and that read them last.
        self.alive = np.asarray([[v, first, dies.get(v, -1)] for v, first in self.born.items()]).T
        self.uses: dict[int, list[tuple[int, int]]] = {}
        for i, read in enumerate(flow.reads):
            for j, v in enumerate(read):
                self.uses.setdefault(v, []).append((i, j))
        last = len(flow.steps)
        for j, v in enumerate(flow.closure(flow.results())[1]):
            self.uses.setdefault(v, []).append((last, j))
        # By each source, the pieces that read it, in order.
        self.readers = {
            v: sorted({self.piece_at(i) for i, _ in where})
            for v, where in self.uses.items()
            if v in flow.sources
        }
        self.regions = [flow.steps[start].region for start in self.bounds[:-1]]
        self.rows = {row for region in flow.traced.regions for row in region.rows}
        self.carried = {
            v
            for v, pieces in self.readers.items()
            if v not in self.rows and (len(pieces) >= SHARED_BY or any(self.regions[k] >= 0 for k in pieces))
        }

        self.carried -= {v for v in self.carried if self._held_by_layers(v)}

    def _held_by_layers(self, v: int) -> bool:
        """Whether a source that many pieces read is a small weight of layers that can be passed."""
        pieces, traced = self.readers[v], self.flow.traced
        if v not in self.flow.carrying or any(self.regions[k] >= 0 for k in pieces):
            return False
        room = (len(pieces) - 1) * traced.nbytes(v)
        for k in pieces:
            some = tiled(self.found, self.bounds[k], self.bounds[k + 1])
            if not some or any(why_not(one, traced.avals) is not None for one in some):
                return False
            if any(v in one.inputs or sum(map(traced.nbytes, one.inputs)) < room for one in some):
                return False
        return True

    def piece_at(self, step: int) -> int:
        """The piece in which an operation stands; results are made in the last."""
        return min(bisect.bisect_right(self.bounds, step), self.count) - 1

    def first_input(self) -> tuple[int, ...]:
        """The values of the chain's input: what is carried, and the data that the first piece alone reads."""
        alone = {
            v
            for v, pieces in self.readers.items()
            if pieces == [0] and v not in self.flow.carrying | self.rows
        }
        return self.ordered(self.carried | alone, 0)

    def crossing(self, k: int) -> tuple[int, ...]:
        """The values that cross the cut after piece `k`."""
        if k < 0:
            return self.first_input()
        if k == self.count - 1:
            return tuple(self.flow.results())
        at, region, following = self.bounds[k + 1], self.regions[k], self.regions[k + 1]
        values = {*self.alive[0][(self.alive[1] < at) & (at <= self.alive[2])].tolist()}
        if region < 0:
            values |= {v for v in self.carried if self.readers[v][-1] > k}
            # Before a loop also what the loop carries and never reads.
            values |= {*self.flow.traced.regions[following].carry} if following >= 0 else set()
            return self.ordered(values, at)
        # In a loop nothing from outside is dropped, and at its end everything is where it was.
        carry = self.flow.traced.regions[region].carry
        before = self.crossing(self.regions.index(region) - 1)
        if following != region:
            return tuple(carry.get(v, v) for v in before)
        begins = self.bounds[self.regions.index(region)]
        inner = {v for v in values if self.born[v] >= begins or v in carry}
        inner |= {v for v in self.born if begins <= self.born[v] < at and v in carry.values()}
        return self.ordered(inner | {v for v in before if v not in carry}, at)

    def ordered(self, values: set[int], at: int) -> tuple[int, ...]:
        """Those with a gradient by their next use, so that equal pieces have them in the same places; then
        the others."""

        def key(v: int) -> tuple[Any, ...]:
            if v not in self.flow.carrying:
                return (1, v)
            where = self.uses.get(v, [])
            following = bisect.bisect_left(where, (at, -1))
            return (0, *(where[following] if following < len(where) else (len(self.flow.steps) + 1, v)))

        return tuple(sorted(values, key=key))

    def steps(self, k: int) -> list[Step]:
        """The operations of piece `k`, with those that make the cheap values it reads."""
        out: list[Step] = []
        inside: set[int] = set()

        def add(values: Sequence[int]) -> None:
            for cheap in self.flow.closure(values)[0]:
                if cheap.outputs[0] not in inside:
                    inside.update(cheap.outputs)
                    out.append(cheap)

        for step in self.flow.steps[self.bounds[k] : self.bounds[k + 1]]:
            add(step.read)
            out.append(step)
        if k == self.count - 1:
            add(self.flow.results())
        return out

    def spec(self, k: int, crosses: tuple[int, ...]) -> PieceSpec:
        """Piece `k`."""
        flow, steps = self.flow, self.steps(k)
        made = dict.fromkeys(v for step in steps for v in step.outputs)
        outside = list(dict.fromkeys(v for step in steps for v in step.read if v not in made))
        crossing = {*crosses}
        results = tuple(v for v in made if v in crossing)
        held = [v for v in outside if v in flow.sources and v not in self.carried]
        params = tuple(v for v in held if v in flow.carrying)
        others = tuple(v for v in held if v not in flow.carrying and self.readers[v] != [0])
        own = {*params, *others}
        reads = tuple(v for v in outside if v not in own)
        avals = flow.traced.avals
        main = flow.steps[self.bounds[k] : self.bounds[k + 1]]
        inputs = (*reads, *params, *others)
        layers, why = self.known(k, reads, numbering(steps, inputs), results)
        return PieceSpec(
            start=self.bounds[k],
            stop=self.bounds[k + 1],
            program=Program(steps, inputs, results, avals),
            reads=reads,
            params=params,
            others=others,
            results=results,
            crosses=crosses,
            made_bytes=sum(flow.traced.nbytes(v) for step in main for v in step.outputs),
            region=self.regions[k],
            depth=flow.traced.regions[self.regions[k]].depth if self.regions[k] >= 0 else 1,
            label=_label(flow, main, (*params, *(v for v in reads if v in flow.sources))),
            layers=layers,
            why=why,
        )

    def known(
        self, k: int, reads: Sequence[int], numbers: Mapping[int, int], results: Sequence[int]
    ) -> tuple[tuple[Found, ...], str]:
        """The layers that piece `k` is, their weights with the numbers of its program; or none, and why."""
        start, stop = self.bounds[k], self.bounds[k + 1]
        some = tiled(self.found, start, stop)
        if not some:
            return (), _unknown(self.flow, self.found, start, stop)
        avals = self.flow.traced.avals
        reasons = [why for one in some if (why := why_not(one, avals)) is not None]
        if reasons:
            return (), reasons[0]
        if {*some[-1].results} - {*some[0].inputs} != {*results}:
            return (), "what it computes beside its result is needed too"
        if any(v in reads for one in some for w in one.weights for v in self._read_for(w, k)):
            return (), "its weights cross the cuts, as three or more pieces read them"
        if not {*some[0].inputs} <= {*reads}:
            return (), "its input is read by other pieces, too"
        layers = [jax.tree.map(lambda leaf: _numbered(leaf, numbers), one.layer) for one in some]
        return tuple(
            dataclasses.replace(one, layer=layer) for one, layer in zip(some, layers, strict=True)
        ), ""

    def _read_for(self, weight: Weight, k: int) -> list[int]:
        """The values that are no operation's of piece `k` of which a weight is made."""
        makers = {v: step for step in self.steps(k) for v in step.outputs}
        found, waiting, seen = [], [weight.value], set[int]()
        while waiting:
            value = waiting.pop()
            if value is None or value in seen:
                continue
            seen.add(value)
            if value in makers:
                waiting += makers[value].read
            else:
                found.append(value)
        return found

    def kept_alike(self, specs: list[PieceSpec]) -> list[PieceSpec]:
        """Data that crosses no further than a repeated piece crosses one cut more, where this makes it equal
        to those before it."""
        out = specs[:1]
        for k, spec in enumerate(specs[1:], 1):
            before = out[-1]
            if k < self.count - 1 and spec.region == before.region == -1 and spec.program == before.program:
                left = [v for v in before.crosses if v not in spec.crosses and v not in self.flow.carrying]
                crosses = self.ordered({*spec.crosses, *left}, spec.stop)
                spec = dataclasses.replace(spec, crosses=crosses)
            out.append(spec)
        return out


def assemble(flow: Flow, cuts: Sequence[int], found: Sequence[Found] = ()) -> Plan:
    """The pieces of a flow that is cut at these positions; `found`, the layers that stand in it."""
    made = _Assembler(flow, [0, *cuts, len(flow.steps)], found)
    inputs = made.first_input()
    specs = made.kept_alike([made.spec(k, made.crossing(k)) for k in range(made.count)])
    avals = flow.traced.avals
    values = {*inputs, *(v for spec in specs for v in (*spec.crosses, *spec.others))}
    how = {v: held_as(avals[v], v in flow.carrying) for v in values}
    for v in inputs:
        if how[v] == BITS and v not in made.carried:
            # It crosses no cut. A layer's rules rebuild its cotangent too.
            first = specs[0].layers
            how[v] = PLAIN if first and v in first[0].inputs else STOPPED
    groups: list[Group] = []
    for region, some in itertools.groupby(range(len(specs)), key=lambda i: specs[i].region):
        within = list(some)
        groups += (
            [Group(i, 1) for i in within]
            if region < 0
            else [Group(within[0], len(within), depth=specs[within[0]].depth)]
        )
    return Plan(pieces=tuple(specs), inputs=inputs, how=how, carrying=flow.carrying, groups=tuple(groups))


def _numbered(leaf: Any, numbers: Mapping[int, int]) -> Any:
    return leaf.numbered(numbers) if isinstance(leaf, Weight) else leaf


def _unknown(flow: Flow, found: Sequence[Found], start: int, stop: int) -> str:
    """The first operation of a piece that is in no known layer."""
    inside = {i for one in found for i in range(one.start, one.stop)}
    cut = [one for one in found if one.start < start < one.stop or one.start < stop < one.stop]
    for i in range(start, stop):
        name = flow.steps[i].primitive.name
        if i not in inside and flow.steps[i].primitive is not ALIAS:
            return f"it contains `{name}`, which is in no run of known layers"
    if cut:
        return f"it is a part of a {type(cut[0].layer).__name__}"
    return "its layers do not follow one after another"


def _label(flow: Flow, steps: Sequence[Step], params: Sequence[int]) -> str:
    """What a piece is called: the scopes that its operations share, else the path that its parameters share,
    else what it does."""
    scopes = [step.scope.split("/") for step in steps if step.scope]
    if scopes and (shared := _prefix(scopes)):
        return "/".join(shared)
    names = flow.traced.signature.names
    dynamic = flow.traced.signature.dynamic
    stacked = stacked_by(flow.traced.regions)
    paths = [names[dynamic[v]].strip("`") for v in (stacked.get(v, v) for v in params) if v < len(dynamic)]
    paths = [path for path in paths if path.startswith("params")]
    if paths and len(shared := _prefix([_split(path) for path in paths])) > 1:
        return "".join(shared)
    heads = list(dict.fromkeys(scope[0] for scope in scopes))
    if heads:
        return " .. ".join(heads if len(heads) < 3 else (heads[0], heads[-1]))
    plain = Counter(s.primitive.name for s in steps if s.primitive.name not in ELEMENTWISE | SHAPES)
    return " ".join(name for name, _ in plain.most_common(3)) or "elementwise"


def _split(path: str) -> list[str]:
    """A path as `jax.tree_util.keystr` writes it, by its keys."""
    out = [""]
    for character in path:
        if character in "[." and out[-1]:
            out.append("")
        out[-1] += character
    return out


def _prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    """What all paths begin with."""
    shared = []
    for names in zip(*paths):
        if len({*names}) > 1:
            break
        shared.append(names[0])
    return shared
