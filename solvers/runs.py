r"""Candidate runs: everything that may stand between two nodes of a chain, with its exact bytes and time.

A chain is a path over nodes `(position, e)`, `e` true where the boundary activation is kept by the run to the
left (docs/accounting.md). A run `c` from `(s, e)` to `(r, e')` is known to a solver by five integers: forward
peak `F`, without the waiting cotangent `K`; backward peak `B`; held bytes `H`; time `t`; and `e'`. Prepended
to a suffix plan it gives

    need = max(F + K, B, H + need_rest),   time = t + time_rest.

`Candidates` lists the STORE, MOONWALK and INVERT runs from a node, and OFFLOAD runs where there is memory on
the host, dominated ones left out; RECOMPUTE runs need the table of inner schedules, which
`mwplan.solvers.frontier` builds, and only their forward part is here.

**Moonwalk runs** (ours). From `(s, e)` labels grow to the right, one option a layer. A label is
`(t, h, b, F, err)`: time, held bytes, backward peak, forward peak, error. Appending layer `l` with fragment
`f` adds `f` to every R and M event before it, since these events come while the fragments to their right are
alive, so `b' = max(b + f, R_l, M_l)`: prefixes are all that is needed, and a label that is no better in any
of the five numbers can be dropped whatever follows. This is exact. Whether layer `l` `keeps_output` decides
what the next layer sees, so labels compete only within that class.

**Invert runs** grow to the left from `r`, with labels `(t, F, B, h, a, e, err)`: `h` is what the layers keep
besides `x_r`, all of which is there at every event to the right of the next layer's; `a` is the error of the
activation, `e` that of the cotangent, `err` that of the run. A run ends where `err` is within its share of
`max_error`; longer ones have larger shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwplan.common.errors import ArgumentError
from mwplan.plans.profiles import InvertOption, MoonwalkOption, Profile
from mwplan.plans.schedule import Choice, Run, RunKind, Strategy, check_allowed, walk
from mwplan.solvers.parallel import each, processors
from mwplan.solvers.pareto import Bools, Floats, Ints, begins, ends, nondominated

ALL_STRATEGIES = frozenset(Strategy)
_STORE, _MOONWALK, _INVERT, _OFFLOAD = 0, 1, 2, 3
#: nodes whose runs are made together
_TOGETHER = 64


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


def check_max_error(max_error: float) -> None:
    """Raises `ArgumentError` unless `max_error` is a number, at least 0."""
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not max_error >= 0:
        raise ArgumentError(f"`max_error={max_error!r}` must be a number, at least 0")


def moonwalk_strategy(option: MoonwalkOption) -> Strategy:
    """VIJP if the option keeps no fragment, else FRAGMENT."""
    return Strategy.FRAGMENT if option.fragment_bytes else Strategy.VIJP


def error_of(profile: Profile, runs: Iterable[Run]) -> float:
    """The predicted error of `runs`: the largest of the MOONWALK runs' or, if larger, the INVERT runs'
    together; inner ones included."""
    worst = inverted = 0.0
    for run in walk(tuple(runs)):
        layers = profile.layers[run.start : run.stop]
        if run.kind is RunKind.MOONWALK:
            error = 0.0
            for layer, name in zip(layers, run.options):
                o = next(o for o in layer.moonwalk if o.name == name)
                error = math.hypot(o.growth * error, o.local_error)
                worst = max(worst, error)
        elif run.kind is RunKind.INVERT:
            chosen = [next(o for o in x.invert if o.name == n) for x, n in zip(layers, run.options)]
            inverted = math.hypot(inverted, invert_error(chosen))
    return max(worst, inverted)


def invert_error(options: Sequence[InvertOption]) -> float:
    """The error of an INVERT run by these options, input first: of its activations, of its gradients, and of
    the cotangent that leaves it."""
    error = left = worst = 0.0
    for o in reversed(options):
        error = math.hypot(o.growth * error, o.local_error)
        kinked = math.hypot(left, math.sqrt(o.kink * error))
        worst = max(worst, error, math.hypot(kinked, o.gradient_sensitivity * error))
        left = math.hypot(kinked, o.sensitivity * error)
        worst = max(worst, left)
    return worst


def invert_share(max_error: float, layers: Any, size: int) -> Any:
    """The largest error allowed to an INVERT run of `layers` layers (a number or an array of them) in a chain
    of `size`: the runs' errors add in squares."""
    return max_error * np.sqrt(layers / size)


def fastest_ns(profile: Profile) -> int:
    """No schedule is faster: every layer by its fastest option, whatever its bytes and error."""
    total = 0
    for layer in profile.layers:
        ways = [o.forward_ns + o.backward_ns for o in layer.store]
        ways += [o.forward_ns + o.reverse_ns + o.rebuild_ns for o in layer.moonwalk]
        ways += [o.forward_ns + o.backward_ns for o in layer.invert]
        ways += [o.forward_ns + o.backward_ns for o in layer.offload]
        total += min(ways)
    return total


class Candidates:
    """The candidate runs of a profile under `max_error` and `allowed`.

    **Arguments:** `max_error`, the largest error that any run may predict; `allowed`, the strategies that may
    be used, at any depth; `per_layer`, a narrower choice for some layers (1 to L); `loss`, if not 0: labels
    of moonwalk and invert runs whose times differ by less than that factor count as equally fast, so that
    fewer survive, at a loss of at most `(1 + loss)` for each layer of a run; `optimistic`: their times are
    then rounded down, for a bound; `by_strategy`: runs are left out only for runs of the same strategies
    layer by layer (there are many of those), because a side condition may single out some layers and count
    different runs; `host`: whether there are OFFLOAD runs, left out only for runs that need no more of the
    host's memory either; `of`: how many layers the chain has of which `profile` is a part.
    **Cost:** moonwalk labels are grown on first use, once for each distinct stretch of layers (equal layers
    at different depths share them); their number is that of the five-way trade-offs among the options, small
    when options are few or ordered.
    **Assumes** (checked by `Profile`): byte and time sums fit 63 bits.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        max_error: float = 1e-4,
        allowed: Choice = ALL_STRATEGIES,
        per_layer: Mapping[int, frozenset[Strategy]] | None = None,
        loss: float = 0.0,
        optimistic: bool = False,
        by_strategy: bool = False,
        host: bool = False,
        of: int | None = None,
    ) -> None:
        check_max_error(max_error)
        self.profile = profile
        self.host = host
        self.loss, self.optimistic, self.by_strategy = loss, optimistic, by_strategy
        self.max_error = float(max_error)
        self.allowed = check_allowed(allowed)
        #: what each layer may use, index 0 being layer 1
        self.layer_allowed = [
            self.allowed & (per_layer or {}).get(at + 1, self.allowed) for at in range(len(profile))
        ]
        self.size = len(profile)
        self.whole = of or self.size
        self.activation = np.array(profile.activation_bytes, dtype=np.int64)
        self.cotangent = np.array(profile.cotangent_bytes, dtype=np.int64)
        self.sweep = np.array(profile.sweep_cotangent_bytes, dtype=np.int64)
        self.forward_ns = np.array([layer.forward_ns for layer in profile.layers], dtype=np.int64)
        # forward_sum[j] - forward_sum[s] is one forward of the layers s+1..j.
        self.forward_sum = np.concatenate([[0], np.cumsum(self.forward_ns)]).astype(np.int64)
        self._workspace = np.array([x.forward_workspace_bytes for x in profile.layers], dtype=np.int64)
        self.layer_class = self._classes()
        self._usable = [self._options(at, layer.moonwalk) for at, layer in enumerate(profile.layers)]
        self._usable_invert = [self._options(at, layer.invert) for at, layer in enumerate(profile.layers)]
        self._moonwalks = [_Options.of(options) for options in self._usable]
        # codes[start, kept][stop]: the labels' parents and options; nodes whose runs were made together share
        # them
        self._codes: dict[tuple[int, bool], dict[int, Ints]] = {}
        self._atoms: dict[tuple[int, bool], Atoms] = {}
        self._peaks: dict[tuple[int, bool], Ints] = {}
        self._invert: list[tuple[Ints, Ints]] = []
        self._inverts = self._invert_runs()
        self.kept_nodes = self._kept_nodes()

    # -- what the other solvers ask for
    # -------------------------------------------------------------------------

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
        parts = -(-len(new) // _TOGETHER)
        if 2 * len(new) > _TOGETHER:
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
        names: list[str] = []
        if kind == _MOONWALK:
            for at in range(stop, start, -1):
                handle, chosen = divmod(handle, len(self._usable[at - 1]))
                names.append(self._usable[at - 1][chosen].name)
                handle = int(self._codes[start, kept][at - 1][handle]) if at - 1 > start else 0
            return Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=tuple(reversed(names)))
        for at in range(start, stop):
            option, parent = self._invert[at]
            names.append(self._usable_invert[at][option[handle]].name)
            handle = int(parent[handle])
        return Run(kind=RunKind.INVERT, start=start, stop=stop, options=tuple(names))

    def recompute_reach(self) -> Ints:
        """`[s]`: the largest `j` such that all layers `s+1..j` may be recomputed."""
        out = np.arange(self.size + 1)
        for at in range(self.size - 1, -1, -1):
            if Strategy.RECOMPUTE in self.layer_allowed[at]:
                out[at] = out[at + 1]
        return out

    def recompute_forward_peak(self, start: int, kept: bool) -> Ints:
        """Forward peak of RECOMPUTE runs from `(start, kept)` to `start+1, start+2, ..., L`, without `K`."""
        key = (start, kept)
        if key not in self._peaks:
            own = 0 if kept else int(self.activation[start])
            event = self.activation[start + 1 :] + self._workspace[start:]
            event[1:] += self.activation[start + 1 : -1]
            self._peaks[key] = np.maximum.accumulate(event) + own
        return self._peaks[key]

    def fastest_need(self) -> int | None:
        """Bytes beyond which no schedule of any stretch gains time, where that is plain: the peak of the
        fastest all-STORE schedule, with the largest `K` waiting.

        None where some layer has a way faster than its fastest STORE option, or STORE is not allowed: then
        nothing is cut.
        """
        if not all(Strategy.STORE in allowed for allowed in self.layer_allowed):
            return None
        held, peak, kept = 0, 0, True
        for at, layer in enumerate(self.profile.layers):
            best = min(layer.store, key=lambda o: (o.forward_ns + o.backward_ns, o.residual_bytes))
            time = best.forward_ns + best.backward_ns
            others = [o.forward_ns + o.reverse_ns + o.rebuild_ns for o in self._usable[at]]
            others += [o.forward_ns + o.backward_ns for o in self._usable_invert[at]]
            others += [o.forward_ns + o.backward_ns for o in layer.offload]
            if any(t < time for t in others):
                return None
            names = [o.name for o in layer.store]
            f, b, h, keeps = self._store_cost(at, kept, names.index(best.name))
            peak = max(peak, held + f + max(self.profile.cotangent_bytes), held + b)
            held, kept = held + h, keeps
        return max(peak, held + self.turn_bytes(kept))

    # -- construction
    # --------------------------------------------------------------------------------------------

    def _classes(self) -> list[int]:
        """`classes[l]`, equal for positions whose layer and boundary cost the same; `classes[0]` is the
        input's."""
        seen: dict[Any, int] = {}
        p = self.profile
        out = []
        for at in range(self.size + 1):
            layer = p.layers[at - 1].costs() if at else None
            key = (layer, p.activation_bytes[at], p.cotangent_bytes[at], p.sweep_cotangent_bytes[at])
            out.append(seen.setdefault(key, len(seen)))
        return out

    def _options(self, at: int, options: Iterable[Any]) -> list[Any]:
        """Those of a layer's MOONWALK or INVERT options that may be used at all."""
        out = []
        for o in options:
            strategy = Strategy.INVERT if isinstance(o, InvertOption) else moonwalk_strategy(o)
            errors = [o.growth, o.local_error]
            if isinstance(o, InvertOption):
                errors += [o.sensitivity, o.gradient_sensitivity, o.kink]
            if strategy in self.layer_allowed[at] and np.isfinite(errors).all():
                out.append(o)
        return [o for o in out if not self.max_error < o.local_error]

    def _kept_nodes(self) -> Bools:
        """`[i]`: whether some run may keep its end `i`, so that the node `(i, True)` exists."""
        out = np.zeros(self.size + 1, dtype=np.bool_)
        out[0] = True
        for at, layer in enumerate(self.profile.layers):
            stores = layer.store if Strategy.STORE in self.layer_allowed[at] else ()
            out[at + 1] = any(o.keeps_output for o in (*stores, *self._usable[at]))
            out[at + 1] |= bool(self._usable_invert[at])
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

    def _make_atoms(self, nodes: list[tuple[int, bool]]) -> None:
        """The runs from some nodes, which are in order."""
        # Pieces of columns: number of the node, stop, keeps_end, F, B, H, t, kind, handle, pattern.
        pieces = self._moonwalk_runs(nodes)
        singles: list[tuple[int, ...]] = []
        for k, (start, kept) in enumerate(nodes):
            if Strategy.STORE in self.layer_allowed[start]:
                for handle, o in enumerate(self.profile.layers[start].store):
                    f, b, h, keeps = self._store_cost(start, kept, handle)
                    time = o.forward_ns + o.backward_ns
                    singles.append((k, start + 1, keeps, f, b, h, time, _STORE, handle, 0))
            if self.host and Strategy.OFFLOAD in self.layer_allowed[start]:
                for handle, away in enumerate(self.profile.layers[start].offload):
                    f, b = self._offload_cost(start, kept, handle)
                    time = away.forward_ns + away.backward_ns
                    singles.append((k, start + 1, False, f, b, 0, time, _OFFLOAD, handle, 0))
            if (start, kept) in self._inverts:
                end, forward, back, held, spent, index = self._inverts[start, kept]
                inverts = (k, end, True, forward, back, held + self.activation[end], spent, _INVERT, index, 0)
                pieces.append([np.broadcast_to(x, index.size) for x in inverts])
        pieces.append(list(np.array(singles, dtype=np.int64).reshape(-1, 10).T))
        columns = [np.concatenate(x).astype(np.int64) for x in zip(*pieces)]
        # Runs between the same two nodes compete.
        between = (columns[0] * (self.size + 1) + columns[1]) * 2 + columns[2]
        order = np.argsort(between, kind="stable")
        between, columns = between[order], [x[order] for x in columns]
        kind, pattern = columns[7], columns[9]
        host = np.zeros_like(kind)
        away_ = np.flatnonzero(kind == _OFFLOAD)
        host[away_] = [
            self.profile.layers[stop - 1].offload[handle].host_bytes
            for stop, handle in zip(columns[1][away_].tolist(), columns[8][away_].tolist())
        ]
        columns.append(host)
        new = begins(between)
        if new.size:
            # Moonwalk runs alone have been compared already.
            alone = np.minimum.reduceat(kind == _MOONWALK, np.flatnonzero(new))[np.cumsum(new) - 1]
            mixed = np.flatnonzero(~alone)
            apart = between[mixed]
            if self.by_strategy and mixed.size:
                found = np.unique(4 * pattern[mixed] + kind[mixed], return_inverse=True)[1]
                apart = apart * (int(found.max()) + 1) + found
            # F and B stay apart because K is added to one of them only.
            costs = (columns[6], *columns[3:6], *([host] if away_.size else []))
            mixed = mixed[nondominated([x[mixed] for x in costs], apart)]
            good = np.concatenate([np.flatnonzero(alone), mixed])
            good = good[np.argsort(between[good], kind="stable")]
            between, columns = between[good], [x[good] for x in columns]
        of, stops, keeps_end, forward_, back_, held_, time_, kinds, handles, _, host_ = columns
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
                forward_peak=forward_[part],
                backward_peak=back_[part],
                held=held_[part],
                time=time_[part],
                host=host_[part],
                kind=kinds[part].astype(np.int8),
                handle=handles[part],
                groups=groups[number],
            )

    @property
    def has_moonwalk(self) -> bool:
        """Whether any layer has an option for moonwalk runs that may be used."""
        return any(self._usable)

    def _compared(self, time: Ints) -> tuple[Any, Ints]:
        """What labels of these times are compared by, and the times that they go on with."""
        if not self.loss:
            return time, time
        step = np.log1p(self.loss)
        compared = np.floor(np.log(np.maximum(time, 1)) / step)
        return compared, np.minimum(
            time, np.exp(compared * step).astype(np.int64)
        ) if self.optimistic else time

    def _moonwalk_runs(self, nodes: list[tuple[int, bool]]) -> list[list[Any]]:
        """The moonwalk runs from some nodes, which are in order, as pieces of the columns of
        `_make_atoms`."""
        pieces: list[list[Any]] = []
        starts = np.array([start for start, _ in nodes])
        own = np.array([0 if kept else self.activation[start] for start, kept in nodes])
        bare = np.array([kept for _, kept in nodes])
        codes: dict[int, Ints] = {}
        self._codes.update(dict.fromkeys(nodes, codes))
        old = _Labels.begun(starts[:0], own[:0])
        for stop in range(nodes[0][0] + 1, self.size + 1):
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
        a, d = self.activation, self.sweep
        at = stop - 1
        x, n = self._moonwalks[at], len(self._usable[at])
        none = np.zeros(0, dtype=np.intp)
        if not n:
            return old.take(none)
        with np.errstate(over="ignore"):
            error = np.hypot(old.error[:, None] * x.growth, x.local_error).ravel()
        # An error at the limit is allowed; the last digit is as the rounding of `hypot` has it.
        code = np.flatnonzero(error <= self.max_error)
        if not code.size:
            return old.take(none)
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
        time = time + np.where(first, 0, self.forward_ns[at - 1])
        held = held + residual + np.where(first, 0, (old.keeps[parent] | x.keeps_input[o]) * a[at])
        own = np.maximum(held + out + (d[stop] + d[at]) + x.reverse[o], rebuild + x.rebuild[o])
        own = np.maximum(own + x.own_fragment[o], old.back[parent] + fragment)
        keeps, pattern = x.keeps_output[o], old.pattern[parent]
        compared, time = self._compared(time)
        last = np.maximum(own, advance + x.last[o])
        # What the next layer sees of a label is whether its output is kept.
        apart = 2 * node + keeps
        if self.by_strategy:
            pattern = np.unique(2 * pattern + (fragment > 0), return_inverse=True)[1]
            apart = apart * (int(pattern.max()) + 1) + pattern
        index = nondominated([compared, held, last, forward], apart)
        columns = (node, stop, keeps, forward, last, held + out, time, _MOONWALK, code, pattern)
        pieces.append([x[index] if isinstance(x, np.ndarray) else np.full(index.size, x) for x in columns])
        if stop == self.size or not self._usable[stop]:
            return old.take(none)
        back = np.maximum(own, advance + (a[stop] - saving) + x.advance[o])
        error = error[code] if np.isfinite(self.max_error) else np.zeros(code.size)
        index = nondominated([compared, held, back, forward, error], apart)
        # Groups are in order of nodes, and so are labels.
        return _Labels(node, time, held, back, forward, error, keeps, code, pattern).take(index)

    def _invert_runs(self) -> dict[tuple[int, bool], tuple[Ints, ...]]:
        """For each node, the INVERT runs from it as columns: `stop`, forward peaks, backward peaks, held
        bytes without the end, times, label indices.

        Labels of all runs grow together, layer by layer towards the input. `_invert[at]`: the option that
        each label takes at layer `at + 1`, and its number among the labels before, of which the last begins a
        run.
        """
        out: dict[tuple[int, bool], tuple[Ints, ...]] = {}
        a, c = self.activation, self.cotangent
        self._invert = [(np.zeros(0, dtype=np.int64),) * 2] * self.size
        # stop, time, F, F where the input is kept, B, B likewise, held; error of the activation, of the
        # cotangent, of the run
        costs, errors = np.zeros((7, 0), dtype=np.int64), np.zeros((3, 0))
        for at in range(self.size - 1, -1, -1):
            usable = self._usable_invert[at]
            if not usable:
                costs, errors = costs[:, :0], errors[:, :0]
                continue
            costs = np.append(costs, np.array([[at + 1], *[[0]] * 6]), axis=1)
            errors = np.append(errors, np.zeros((3, 1)), axis=1)
            stop, time, forward, _, back, _, held = costs
            error, left, worst = errors
            most = invert_share(self.max_error, stop, self.whole)
            grown = []
            for k, o in enumerate(usable):
                with np.errstate(over="ignore"):
                    err = np.hypot(o.growth * error, o.local_error)
                    kinked = np.hypot(left, np.sqrt(o.kink * err))
                    out_ = np.hypot(kinked, o.sensitivity * err)
                    most_ = np.maximum(worst, np.hypot(kinked, o.gradient_sensitivity * err))
                most_ = np.maximum(most_, np.maximum(err, out_))
                ok = np.flatnonzero(most_ <= most)
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
                grown.append((columns, (err[ok], out_[ok], most_[ok]), np.full(ok.size, k), ok))
            costs, errors = (np.concatenate([x[i] for x in grown], axis=1) for i in (0, 1))
            option, parent = (np.concatenate([x[i] for x in grown]) for i in (2, 3))
            if not np.isfinite(self.max_error):
                errors = np.zeros_like(errors)
            compared, costs[1] = self._compared(costs[1])
            kept = nondominated([compared, *costs[2:], *errors], costs[0])
            costs, errors = costs[:, kept], errors[:, kept]
            self._invert[at] = option[kept], parent[kept]
            stop, time, forward, forward_kept, back, back_kept, held = costs
            ends = np.flatnonzero(errors[2] <= invert_share(self.max_error, stop - at, self.whole))
            for bare, peaks in ((False, (forward, back)), (True, (forward_kept, back_kept))):
                out[at, bare] = (*(x[ends] for x in (stop, *peaks, held, time)), ends)
        return out
