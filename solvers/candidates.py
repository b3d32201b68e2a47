r"""Candidate runs: everything that may stand between two nodes of a chain, with its exact bytes and time.

A chain is a path over nodes `(position, e)`, `e` true where the boundary activation is kept by the run to the
left (docs/accounting.md). A run `c` from `(s, e)` to `(r, e')` is known to a solver by five integers: forward
peak `F`, without the waiting cotangent `K`; backward peak `B`; held bytes `H`; time `t`; and `e'`. Prepended
to a suffix plan it gives

    need = max(F + K, B, H + need_rest),   time = t + time_rest.

`Candidates` lists the STORE, MOONWALK and INVERT runs from a node, and OFFLOAD runs where there is memory on
the host, dominated ones left out; RECOMPUTE runs need the table of inner schedules, which
`mwplan.solvers.tables` builds, and only their forward part is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mwplan.plans.schedule import Run, RunKind, Strategy
from mwplan.solvers.inverting import InvertRuns
from mwplan.solvers.layer_costs import LayerCosts, Rounding
from mwplan.solvers.moonwalk import MoonwalkRuns
from mwplan.solvers.parallel import each, processors
from mwplan.solvers.pareto import Bools, Ints, begins, ends, nondominated
from mwplan.solvers.problem import Problem

Node = tuple[int, bool]
_STORE, _MOONWALK, _INVERT, _OFFLOAD = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Atoms:
    """The STORE, MOONWALK, INVERT and OFFLOAD runs from one node, one row each, sorted by `stop`.

    `forward_peak` is without `K`. `host`: bytes in the host's memory. `kind` and `handle` say how
    `Candidates.run` spells the run out.
    """

    stop: Ints
    keeps_end: Bools
    forward_peak: Ints
    backward_peak: Ints
    held: Ints
    time: Ints
    host: Ints
    kind: NDArray[np.int8]
    handle: Ints
    #: `(stop, keeps_end, end row)` of each stretch of rows that lead to one node
    groups: list[tuple[int, bool, int]]

    def __len__(self) -> int:
        return len(self.stop)

    @property
    def costs(self) -> list[Ints]:
        """`F`, `B`, `H` and `t` of each."""
        return [self.forward_peak, self.backward_peak, self.held, self.time]


class Candidates:
    """The candidate runs of a problem.

    **Arguments:** `problem`: its `max_error` is the largest error that any run may predict, its `pins` and
    `forbid` narrow some layers' strategies; with `max_distinct_runs` runs are left out only for runs of the
    same strategies layer by layer (there are many of those), because a side condition may single out some
    layers and count different runs; where it may offload, there are OFFLOAD runs, and runs are left out only
    for runs that need no more of the host's memory either. `loss`, if not 0: labels of moonwalk and invert
    runs whose times differ by less than that factor count as equally fast, so that fewer survive, at a loss
    of at most `(1 + loss)` for each layer of a run; `optimistic`: their times are then rounded down, for a
    bound; `whole`: how many layers the chain has of which the profile is a part.
    **Cost:** moonwalk labels are grown on first use, once for each distinct stretch of layers (equal layers
    at different depths share them); their number is that of the five-way trade-offs among the options, small
    when options are few or ordered.
    **Assumes** (checked by `Profile`): byte and time sums fit 63 bits.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        loss: float = 0.0,
        optimistic: bool = False,
        whole: int | None = None,
    ) -> None:
        self.problem, self.profile = problem, problem.profile
        self.loss, self.by_strategy = loss, problem.max_distinct_runs is not None
        self.offloads = problem.offloads
        self.layers = LayerCosts(problem, whole)
        self.size, self.allowed = self.layers.size, problem.strategies
        self.activation, self.cotangent = self.layers.activation, self.layers.cotangent
        self.forward_sum, self.layer_class = self.layers.forward_sum, self.layers.classes()
        rounding = Rounding(loss=loss, optimistic=optimistic, by_strategy=self.by_strategy)
        self.moonwalks, self.inverts = MoonwalkRuns(self.layers, rounding), InvertRuns(self.layers, rounding)
        self._atoms: dict[Node, Atoms] = {}
        self._peaks: dict[Node, Ints] = {}
        self.kept_nodes, self.reach = self._kept_nodes(), self._reach()

    def own_bytes(self, start: int, kept: bool) -> int:
        """What a RECOMPUTE run from the node `(start, kept)` holds: its input, where nobody else does."""
        return 0 if kept else int(self.activation[start])

    def turn_bytes(self, keeps_end: bool) -> int:
        """Bytes above the held ones when the loss is differentiated."""
        p = self.profile
        return (0 if keeps_end else p.activation_bytes[-1]) + p.cotangent_bytes[-1]

    def atoms(self, start: int, kept: bool) -> Atoms:
        """The STORE, MOONWALK and INVERT runs from the node `(start, kept)`."""
        key = (start, kept)
        if key not in self._atoms:
            self.prepare([key])
        return self._atoms[key]

    def prepare(self, nodes: Iterable[tuple[int, bool]]) -> None:
        """Makes the runs from these nodes, many nodes at a time: that is faster than one by one."""
        new = sorted({*nodes} - self._atoms.keys())
        together = self.problem.tuning.nodes_together
        parts = -(-len(new) // together)
        if 2 * len(new) > together:
            parts = max(parts, processors())
        # Runs from early nodes are many: each part has some.
        each(self._make_atoms, [new[k::parts] for k in range(parts)])

    def run(self, start: int, kept: bool, row: int) -> Run:
        """Row `row` of `atoms(start, kept)` as a `Run`."""
        atoms = self.atoms(start, kept)
        stop, kind, handle = int(atoms.stop[row]), int(atoms.kind[row]), int(atoms.handle[row])
        if kind == _STORE:
            name = self.profile.layers[start].store[handle].name
            return Run(kind=RunKind.STORE, start=start, stop=stop, options=(name,))
        if kind == _OFFLOAD:
            name = self.profile.layers[start].offload[handle].name
            return Run(kind=RunKind.OFFLOAD, start=start, stop=stop, options=(name,))
        if kind == _MOONWALK:
            names = self.moonwalks.names(start, kept, stop, handle)
            return Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=names)
        return Run(
            kind=RunKind.INVERT, start=start, stop=stop, options=self.inverts.names(start, stop, handle)
        )

    def _reach(self) -> Ints:
        """`[s]`: the largest `j` such that all layers `s+1..j` may be recomputed."""
        out = np.arange(self.size + 1)
        for at in range(self.size - 1, -1, -1):
            if Strategy.RECOMPUTE in self.layers.allowed[at]:
                out[at] = out[at + 1]
        return out

    def recompute_forward_peak(self, start: int, kept: bool) -> Ints:
        """Forward peak of RECOMPUTE runs from `(start, kept)` to `start+1, start+2, ..., L`, without `K`."""
        key = (start, kept)
        if key not in self._peaks:
            own = 0 if kept else int(self.activation[start])
            event = self.activation[start + 1 :] + self.layers.workspace[start:]
            event[1:] += self.activation[start + 1 : -1]
            self._peaks[key] = np.maximum.accumulate(event) + own
        return self._peaks[key]

    def fastest_need(self) -> int | None:
        """Bytes beyond which no schedule of any stretch gains time, where that is plain: the peak of the
        fastest all-STORE schedule, with the largest `K` waiting.

        None where some layer has a way faster than its fastest STORE option, or STORE is not allowed: then
        nothing is cut.
        """
        if not all(Strategy.STORE in allowed for allowed in self.layers.allowed):
            return None
        held, peak, kept = 0, 0, True
        for at, layer in enumerate(self.profile.layers):
            best = min(layer.store, key=lambda o: (o.forward_ns + o.backward_ns, o.residual_bytes))
            time = best.forward_ns + best.backward_ns
            others = [o.forward_ns + o.reverse_ns + o.rebuild_ns for o in self.layers.moonwalk[at]]
            others += [o.forward_ns + o.backward_ns for o in self.layers.invert[at]]
            others += [o.forward_ns + o.backward_ns for o in layer.offload]
            if any(t < time for t in others):
                return None
            names = [o.name for o in layer.store]
            f, b, h, keeps = self._store_cost(at, kept, names.index(best.name))
            peak = max(peak, held + f + max(self.profile.cotangent_bytes), held + b)
            held, kept = held + h, keeps
        return max(peak, held + self.turn_bytes(kept))

    def _kept_nodes(self) -> Bools:
        """`[i]`: whether some run may keep its end `i`, so that the node `(i, True)` exists."""
        out = np.zeros(self.size + 1, dtype=np.bool_)
        out[0] = True
        for at, layer in enumerate(self.profile.layers):
            stores = layer.store if Strategy.STORE in self.layers.allowed[at] else ()
            out[at + 1] = any(o.keeps_output for o in (*stores, *self.layers.moonwalk[at]))
            out[at + 1] |= bool(self.layers.invert[at])
        return out

    def _store_cost(self, start: int, kept: bool, index: int) -> tuple[int, int, int, bool]:
        """Forward peak, backward peak, held bytes and keeps_end of STORE option `index` of layer
        `start+1`."""
        p, o = self.profile, self.profile.layers[start].store[index]
        own = 0 if kept else p.activation_bytes[start]
        held = o.residual_bytes + own * o.keeps_input + p.activation_bytes[start + 1] * o.keeps_output
        forward = own + p.activation_bytes[start + 1] + o.residual_bytes + o.forward_workspace_bytes
        back = held + p.cotangent_bytes[start + 1] + p.cotangent_bytes[start] + o.backward_workspace_bytes
        back -= 0 if kept and o.keeps_input else o.backward_saving_bytes
        return forward, back, held, o.keeps_output

    def _offload_cost(self, start: int, kept: bool, index: int) -> tuple[int, int]:
        """Forward and backward peak of OFFLOAD option `index` of layer `start+1`."""
        p, o = self.profile, self.profile.layers[start].offload[index]
        own = 0 if kept else p.activation_bytes[start]
        forward = own + p.activation_bytes[start + 1] + o.forward_workspace_bytes
        return forward, p.cotangent_bytes[start + 1] + p.cotangent_bytes[start] + o.backward_workspace_bytes

    def _make_atoms(self, nodes: list[Node]) -> None:
        """The runs from some nodes, which are in order."""
        # Columns: number of the node, stop, keeps_end, F, B, H, t, kind, handle, pattern, host.
        columns = self._columns(nodes)
        # Runs between the same two nodes compete.
        between = (columns[0] * (self.size + 1) + columns[1]) * 2 + columns[2]
        order = np.argsort(between, kind="stable")
        between, columns = between[order], [x[order] for x in columns]
        if between.size:
            good = self._undominated(between, columns)
            between, columns = between[good], [x[good] for x in columns]
        of, stops, keeps_end, forward, back, held, time, kinds, handles, _, host = columns
        cuts = np.flatnonzero(ends(between))
        first = of.searchsorted(np.arange(len(nodes) + 1))
        groups: list[list[tuple[int, bool, int]]] = [[] for _ in nodes]
        for number, stop, keeps, row in zip(
            of[cuts], stops[cuts], keeps_end[cuts], cuts + 1 - first[of[cuts]]
        ):
            groups[number].append((int(stop), bool(keeps), int(row)))
        for number, node in enumerate(nodes):
            part = slice(first[number], first[number + 1])
            self._atoms[node] = Atoms(
                stop=stops[part],
                keeps_end=keeps_end[part].astype(np.bool_),
                forward_peak=forward[part],
                backward_peak=back[part],
                held=held[part],
                time=time[part],
                host=host[part],
                kind=kinds[part].astype(np.int8),
                handle=handles[part],
                groups=groups[number],
            )

    def _columns(self, nodes: list[Node]) -> list[Ints]:
        """All runs from some nodes, as `_make_atoms` has them."""
        pieces = []
        for *costs, handle, pattern in self.moonwalks.pieces(nodes):
            same = [np.full(handle.size, x) for x in (_MOONWALK, 0)]
            pieces.append([*costs, same[0], handle, pattern, same[1]])
        singles: list[tuple[int, ...]] = []
        for k, (start, kept) in enumerate(nodes):
            layer, allowed = self.profile.layers[start], self.layers.allowed[start]
            if Strategy.STORE in allowed:
                for handle, o in enumerate(layer.store):
                    f, b, h, keeps = self._store_cost(start, kept, handle)
                    time = o.forward_ns + o.backward_ns
                    singles.append((k, start + 1, keeps, f, b, h, time, _STORE, handle, 0, 0))
            if self.offloads and Strategy.OFFLOAD in allowed:
                for handle, sent in enumerate(layer.offload):
                    f, b = self._offload_cost(start, kept, handle)
                    time, host = sent.forward_ns + sent.backward_ns, sent.host_bytes
                    singles.append((k, start + 1, False, f, b, 0, time, _OFFLOAD, handle, 0, host))
            if (start, kept) in self.inverts.found:
                end, forward, back, held, spent, index = self.inverts.found[start, kept]
                own = held + self.activation[end]
                inverts = (k, end, True, forward, back, own, spent, _INVERT, index, 0, 0)
                pieces.append([np.broadcast_to(x, index.size) for x in inverts])
        pieces.append(list(np.array(singles, dtype=np.int64).reshape(-1, 11).T))
        return [np.concatenate(x).astype(np.int64) for x in zip(*pieces)]

    def _undominated(self, between: Ints, columns: list[Ints]) -> NDArray[np.intp]:
        """Those of the runs of `_make_atoms` that no other between the same nodes dominates, in order."""
        kind, pattern, host = columns[7], columns[9], columns[10]
        new = begins(between)
        # Moonwalk runs alone have been compared already.
        alone = np.minimum.reduceat(kind == _MOONWALK, np.flatnonzero(new))[np.cumsum(new) - 1]
        mixed = np.flatnonzero(~alone)
        apart = between[mixed]
        if self.by_strategy and mixed.size:
            found = np.unique(4 * pattern[mixed] + kind[mixed], return_inverse=True)[1]
            apart = apart * (int(found.max()) + 1) + found
        # F and B stay apart because K is added to one of them only.
        costs = (columns[6], *columns[3:6], *([host] if (kind == _OFFLOAD).any() else []))
        mixed = mixed[nondominated([x[mixed] for x in costs], apart, self.problem.tuning)]
        good = np.concatenate([np.flatnonzero(alone), mixed])
        return good[np.argsort(between[good], kind="stable")]

    @property
    def has_moonwalk(self) -> bool:
        """Whether any layer has an option for moonwalk runs that may be used."""
        return any(self.layers.moonwalk)
