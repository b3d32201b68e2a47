r"""Candidate moonwalk runs: labels that grow to the right from every node, one option a layer (ours).

A label is `(t, h, b, F, err)`: time, held bytes, backward peak, forward peak, error. Appending layer `l` with
fragment `f` adds `f` to every R and M event before it, since these events come while the fragments to their
right are alive, so `b' = max(b + f, R_l, M_l)`: prefixes are all that is needed, and a label that is no
better in any of the five numbers can be dropped whatever follows. This is exact. Whether layer `l`
`keeps_output` decides what the next layer sees, so labels compete only within that class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.plans.profiles import MoonwalkOption
from mwplan.solvers.layer_costs import LayerCosts, Rounding
from mwplan.solvers.pareto import INF, Bools, Floats, Ints, begins, nondominated

Node = tuple[int, bool]


@dataclass(slots=True)
class _Labels:
    """Moonwalk labels from some nodes to one position, in order of `node`; each goes on from label
    `code // n` of the position before by option `code % n` of `n`.

    `back` is for the label going on; what it is where the run ends here, `_grow` says apart. `pattern`
    numbers the strategies from the node on, if `by_strategy`, and is 0 if not.
    """

    node: Ints
    time: Ints
    held: Ints
    back: Ints
    forward: Ints
    error: Floats
    keeps: Ints
    code: Ints
    pattern: Ints

    @classmethod
    def begun(cls, nodes: Ints, held: Ints) -> _Labels:
        """The labels of runs of no layers."""
        zero = np.zeros_like(nodes)
        return cls(nodes, zero, held, zero, zero, np.zeros(nodes.size), zero, zero, zero)

    def take(self, which: NDArray[np.intp]) -> _Labels:
        """Some of them."""
        return _Labels(*(getattr(self, name)[which] for name in self.__slots__))

    def and_then(self, more: _Labels) -> _Labels:
        """These and, after them, others."""
        return _Labels(
            *(np.concatenate([getattr(self, name), getattr(more, name)]) for name in self.__slots__)
        )


@dataclass(slots=True)
class _Options:
    """The usable moonwalk options of one layer, field by field."""

    growth: Floats
    local_error: Floats
    time: Ints
    residual: Ints
    fragment: Ints
    #: what the fragment adds to R and rebuild of the layer itself: nothing where it is the cotangent
    own_fragment: Ints
    keeps_input: Ints
    keeps_output: Ints
    forward: Ints
    reverse: Ints
    rebuild: Ints
    rebuild_saving: Ints
    advance: Ints
    advance_saving: Ints
    last: Ints

    @classmethod
    def of(cls, options: list[MoonwalkOption]) -> _Options:
        rows = [
            (
                o.forward_ns + o.reverse_ns + o.rebuild_ns,
                o.residual_bytes,
                o.fragment_bytes,
                0 if o.fragment_is_cotangent else o.fragment_bytes,
                int(o.keeps_input),
                int(o.keeps_output),
                o.forward_workspace_bytes,
                o.reverse_workspace_bytes - o.reverse_saving_bytes,
                o.rebuild_workspace_bytes,
                o.rebuild_saving_bytes,
                o.advance_workspace_bytes,
                o.advance_saving_bytes,
                o.last_workspace_bytes,
            )
            for o in options
        ]
        columns = np.array(rows, dtype=np.int64).reshape(len(rows), 13).T
        growth = np.array([o.growth for o in options], dtype=np.float64)
        return cls(growth, np.array([o.local_error for o in options], dtype=np.float64), *columns)


class MoonwalkRuns:
    """The moonwalk runs of a chain: labels, once for each set of nodes that is asked for."""

    def __init__(self, layers: LayerCosts, rounding: Rounding) -> None:
        self.layers, self.rounding = layers, rounding
        self.options = [_Options.of(options) for options in layers.moonwalk]
        # codes[start, kept][stop]: the labels' parents and options; nodes whose runs were made together share
        # them
        self._codes: dict[Node, dict[int, Ints]] = {}

    def names(self, start: int, kept: bool, stop: int, handle: int) -> tuple[str, ...]:
        """The options of run number `handle` from `(start, kept)` to `stop`."""
        names: list[str] = []
        for at in range(stop, start, -1):
            usable = self.layers.moonwalk[at - 1]
            handle, chosen = divmod(handle, len(usable))
            names.append(usable[chosen].name)
            handle = int(self._codes[start, kept][at - 1][handle]) if at - 1 > start else 0
        return tuple(reversed(names))

    def pieces(self, nodes: list[Node]) -> list[list[Any]]:
        """The runs from some nodes, which are in order, as pieces of columns: number of the node, stop,
        keeps_end, F, B, H, t, handle, pattern of strategies."""
        pieces: list[list[Any]] = []
        starts = np.array([start for start, _ in nodes])
        own = np.array([0 if kept else self.layers.activation[start] for start, kept in nodes])
        bare = np.array([kept for _, kept in nodes])
        codes: dict[int, Ints] = {}
        self._codes.update(dict.fromkeys(nodes, codes))
        old = _Labels.begun(starts[:0], own[:0])
        for stop in range(nodes[0][0] + 1, self.layers.size + 1):
            # New labels come last: they are nobody's parents by `codes`.
            new = np.flatnonzero(starts == stop - 1)
            old = old.and_then(_Labels.begun(new, own[new])) if new.size else old
            if old.node.size:
                old = self._grow(stop, old, starts, bare, pieces)
                codes[stop] = old.code
            elif stop > nodes[-1][0]:
                break
        return pieces

    def _grow(self, stop: int, old: _Labels, starts: Ints, bare: Bools, pieces: list[list[Any]]) -> _Labels:
        """Appends layer `stop` to labels of the position before, from nodes at `starts` that are kept
        (`bare`) or not: adds the runs that end here to `pieces`, and returns the labels that go on."""
        layers = self.layers
        a, d = layers.activation, layers.sweep
        at = stop - 1
        x, n = self.options[at], len(layers.moonwalk[at])
        code, error, may_end = self._children(at, old)
        if not code.size:
            return old.take(code)
        parent, o = np.divmod(code, n)
        node = old.node[parent]
        first = starts[node] == at
        held, time, fragment = old.held[parent], old.time[parent] + x.time[o], x.fragment[o]
        residual, out = x.residual[o], x.keeps_output[o] * a[stop]
        ends = d[starts[node]] + d[stop]
        # In a run's first layer, x_s is in `held` unless it is kept; F counts it once.
        forward = np.maximum(
            old.forward[parent], held + residual + np.where(first, 0, a[at]) + a[stop] + x.forward[o]
        )
        advance = ends + np.where(first, held, a[at])
        rebuild = advance + np.where(first, 0, d[at] - x.rebuild_saving[o])
        saving = np.where(first & bare[node], 0, x.advance_saving[o])
        time = time + np.where(first, 0, layers.forward_ns[at - 1])
        held = held + residual + np.where(first, 0, (old.keeps[parent] | x.keeps_input[o]) * a[at])
        own = np.maximum(held + out + (d[stop] + d[at]) + x.reverse[o], rebuild + x.rebuild[o])
        own = np.maximum(own + x.own_fragment[o], old.back[parent] + fragment)
        keeps, pattern = x.keeps_output[o], old.pattern[parent]
        compared, time = self.rounding.compared(time)
        last = np.maximum(own, advance + x.last[o])
        # What the next layer sees of a label is whether its output is kept.
        apart = 2 * node + keeps
        if self.rounding.by_strategy:
            pattern = np.unique(2 * pattern + (fragment > 0), return_inverse=True)[1]
            apart = apart * (int(pattern.max()) + 1) + pattern
        costs = [compared, held, last, forward]
        index = may_end[nondominated([x[may_end] for x in costs], apart[may_end], layers.tuning)]
        columns = (node, stop, keeps, forward, last, held + out, time, code, pattern)
        pieces.append([x[index] if isinstance(x, np.ndarray) else np.full(index.size, x) for x in columns])
        if stop == layers.size or not layers.moonwalk[stop]:
            return old.take(code[:0])
        back = np.maximum(own, advance + (a[stop] - saving) + x.advance[o])
        index = nondominated([compared, held, back, forward, error], apart, layers.tuning)
        # Groups are in order of nodes, and so are labels.
        return _Labels(node, time, held, back, forward, error, keeps, code, pattern).take(index)

    def _children(self, at: int, old: _Labels) -> tuple[NDArray[np.intp], Floats, NDArray[np.intp]]:
        """The labels that layer `at + 1` makes of `old`, as `n` times their parent and the option, in order;
        their errors; and the numbers of those that are worth ending a run.

        A run that ends, and one whose error an option of growth 0 forgets, is compared without its error:
        those that another of the same options beats then have parents that are beaten without theirs.
        """
        x, n, max_error = self.options[at], len(self.layers.moonwalk[at]), self.layers.max_error
        none = np.zeros(0, dtype=np.intp)
        if not n:
            return none, old.error[:0], none
        with np.errstate(over="ignore"):
            error = np.hypot(old.error[:, None] * x.growth, x.local_error)
        # An error at the limit is allowed; the last digit is as the rounding of `hypot` has it.
        fits = error <= max_error
        best = self._best_parents(old, fits)
        fits &= best | (x.growth != 0)
        code = np.flatnonzero(fits)
        errors = error.ravel()[code] if np.isfinite(max_error) else np.zeros(code.size)
        return code, errors, np.flatnonzero(best.ravel()[code])

    def _best_parents(self, old: _Labels, fits: Bools) -> Bools:
        """For each label and option: whether no label before it of its class that `fits` the option as well
        is as good but for its error; true where that is not plain to see.

        It is where labels of a class are in order of time and agree in held bytes and forward peak.
        """
        new = begins(old.node, old.keeps)
        inside = ~new[1:]
        ordered = (old.held[1:] == old.held[:-1]) & (old.forward[1:] == old.forward[:-1])
        ordered &= old.time[1:] >= old.time[:-1]
        if self.rounding.loss or self.rounding.by_strategy or not ordered[inside].all():
            return fits.copy()
        # Those of later classes lie below all earlier ones, so that the running minimum begins anew with
        # each.
        high = int(old.back.max(initial=0)) + 1
        low = old.back - high * np.cumsum(new)
        if high * (int(new.sum()) + 2) >= INF:
            return fits.copy()
        least = np.where(fits, low[:, None], low[:, None] + 2 * high)
        before = np.minimum.accumulate(least, axis=0)
        best = fits.copy()
        best[1:] &= least[1:] < before[:-1]
        return best
