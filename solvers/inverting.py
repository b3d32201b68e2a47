"""Candidate invert runs: labels that grow to the left from every end, one option a layer (ours).

A label is `(t, F, B, h, a, e, err)`: `h` is what the layers keep besides `x_r`, all of which is there at
every event to the right of the next layer's; `a` is the error of the activation, `e` that of the cotangent,
`err` that of the run. A run ends where `err` is within its share of `max_error`; longer ones have larger
shares.
"""

from __future__ import annotations

import numpy as np

from mwplan.plans.profiles import InvertOption
from mwplan.solvers.layer_costs import LayerCosts, Rounding
from mwplan.solvers.pareto import Floats, Ints, nondominated
from mwplan.solvers.predictions import invert_share

Node = tuple[int, bool]


class InvertRuns:
    """The INVERT runs of a chain. `found`: for each node, those from it as columns: `stop`, forward peaks,
    backward peaks, held bytes without the end, times, label indices.

    `labels[at]`: the option that each label takes at layer `at + 1`, and its number among the labels before,
    of which the last begins a run.
    """

    def __init__(self, layers: LayerCosts, rounding: Rounding) -> None:
        self.layers, self.rounding = layers, rounding
        self.labels: list[tuple[Ints, Ints]] = [(np.zeros(0, dtype=np.int64),) * 2] * layers.size
        self.found: dict[Node, tuple[Ints, ...]] = {}
        self._grow_all()

    def names(self, start: int, stop: int, handle: int) -> tuple[str, ...]:
        """The options of run number `handle` from `start` to `stop`."""
        names: list[str] = []
        for at in range(start, stop):
            option, parent = self.labels[at]
            names.append(self.layers.invert[at][option[handle]].name)
            handle = int(parent[handle])
        return tuple(names)

    def _grow_all(self) -> None:
        """Grows the labels of all runs together, layer by layer towards the input."""
        layers = self.layers
        # stop, time, F, F where the input is kept, B, B likewise, held; error of the activation, of the
        # cotangent, of the run
        costs, errors = np.zeros((7, 0), dtype=np.int64), np.zeros((3, 0))
        for at in range(layers.size - 1, -1, -1):
            if not layers.invert[at]:
                costs, errors = costs[:, :0], errors[:, :0]
                continue
            costs = np.append(costs, np.array([[at + 1], *[[0]] * 6]), axis=1)
            errors = np.append(errors, np.zeros((3, 1)), axis=1)
            grown = [self._grown(at, o, costs, errors) for o in layers.invert[at]]
            option = np.repeat(np.arange(len(grown)), [x[2].size for x in grown])
            parent = np.concatenate([x[2] for x in grown])
            costs, errors = (np.concatenate([x[i] for x in grown], axis=1) for i in (0, 1))
            if not np.isfinite(layers.max_error):
                errors = np.zeros_like(errors)
            compared, costs[1] = self.rounding.compared(costs[1])
            kept = nondominated([compared, *costs[2:], *errors], costs[0], layers.tuning)
            costs, errors = costs[:, kept], errors[:, kept]
            self.labels[at] = option[kept], parent[kept]
            stop, time, forward, forward_kept, back, back_kept, held = costs
            ends = np.flatnonzero(errors[2] <= invert_share(layers.max_error, stop - at, layers.whole))
            for bare, peaks in ((False, (forward, back)), (True, (forward_kept, back_kept))):
                self.found[at, bare] = (*(x[ends] for x in (stop, *peaks, held, time)), ends)

    def _grown(self, at: int, o: InvertOption, costs: Ints, errors: Floats) -> tuple[Ints, Floats, Ints]:
        """The labels that option `o` of layer `at + 1` makes of those before it: costs, errors, and of which
        label each is made."""
        layers, a, c = self.layers, self.layers.activation, self.layers.cotangent
        stop, time, forward, _, back, _, held = costs
        error, left, worst = errors
        with np.errstate(over="ignore"):
            err = np.hypot(o.growth * error, o.local_error)
            kinked = np.hypot(left, np.sqrt(o.kink * err))
            out = np.hypot(kinked, o.sensitivity * err)
            most = np.maximum(worst, np.hypot(kinked, o.gradient_sensitivity * err))
        most = np.maximum(most, np.maximum(err, out))
        ok = np.flatnonzero(most <= invert_share(layers.max_error, stop, layers.whole))
        # What this layer keeps is there at all events of the layers to its right.
        q = o.residual_bytes
        event = int(a[at + 1]) + q + o.forward_workspace_bytes
        live = int(a[at + 1] + c[at + 1] + c[at]) + q + o.backward_workspace_bytes
        before, after = forward[ok] + q, back[ok] + q
        columns = [
            stop[ok],
            time[ok] + (o.forward_ns + o.backward_ns),
            np.maximum(before, event + int(a[at])),
            np.maximum(before, event),
            np.maximum(after, live + int(a[at]) - o.backward_saving_bytes),
            np.maximum(after, live),
            held[ok] + q,
        ]
        return np.array(columns), np.array([err[ok], out[ok], most[ok]]), ok
