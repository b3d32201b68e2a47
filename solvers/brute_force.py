"""Exhaustive search over tiny chains: the oracle that the solvers are held to. It shares no code with them.

`every_plan` lists all plans one by one, for the ledger to cost. `every_cost` walks the same plans but merges
those that agree exactly in what a later run can see (node, held bytes, peak, time), so that chains of six
layers with all options take milliseconds; nothing is dropped for being worse. It goes forward, adding up
events as docs/accounting.md writes them, where the solvers go backward.

One kind of plan is left out: a RECOMPUTE run whose inner schedule is a single RECOMPUTE run of the same
layers, which could go on for ever.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from mwplan.plans.profiles import InvertOption, MoonwalkOption
from mwplan.plans.schedule import Run, RunKind, Strategy
from mwplan.solvers.problem import Problem

Cost = tuple[int, int]


def every_plan(problem: Problem) -> Iterator[tuple[Run, ...]]:
    """All plans of the space that keep `max_error` with the strategies `allowed`, nested to any depth; with
    `host_bytes` those that offload too, outside RECOMPUTE runs, whatever they need of it. Their number grows
    like a power of the chain's length: up to 3 or 4 layers."""
    yield from _plans(problem, 0, len(problem.profile), whole=True, host=problem.host_bytes > 0)


def _plans(
    problem: Problem, start: int, stop: int, *, whole: bool, host: bool = False
) -> Iterator[tuple[Run, ...]]:
    p, allowed = problem.profile, problem.strategies
    if start == stop:
        yield ()
        return
    for at in range(start + 1, stop + 1):
        firsts = list(_plain_runs(problem, start, at))
        if host and at == start + 1 and Strategy.OFFLOAD in allowed:
            names = [(o.name,) for o in p.layers[start].offload]
            firsts += [Run(kind=RunKind.OFFLOAD, start=start, stop=at, options=one) for one in names]
        if Strategy.RECOMPUTE in allowed and (whole or (start, at) != (start, stop)):
            for inner in _plans(problem, start, at, whole=False):
                firsts.append(Run(kind=RunKind.RECOMPUTE, start=start, stop=at, inner=inner))
        for rest in _plans(problem, at, stop, whole=True, host=host):
            for first in firsts:
                yield (first, *rest)


def _plain_runs(problem: Problem, start: int, stop: int) -> Iterator[Run]:
    """STORE, MOONWALK and INVERT runs over `(start, stop]`."""
    p, allowed, max_error = problem.profile, problem.strategies, problem.max_error
    if stop == start + 1 and Strategy.STORE in allowed:
        for o in p.layers[start].store:
            yield Run(kind=RunKind.STORE, start=start, stop=stop, options=(o.name,))
    layers = p.layers[start:stop]
    moonwalk = [[o for o in x.moonwalk if _strategy(o) in allowed and _finite(o)] for x in layers]
    for options in itertools.product(*moonwalk):
        if _error(options) <= max_error:
            names = tuple(o.name for o in options)
            yield Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=names)
    if Strategy.INVERT in allowed:
        for inverses in itertools.product(*(filter(_finite, x.invert) for x in layers)):
            if _invert_error(inverses) <= max_error * math.sqrt(len(inverses) / len(p)):
                names = tuple(o.name for o in inverses)
                yield Run(kind=RunKind.INVERT, start=start, stop=stop, options=names)


def _strategy(o: MoonwalkOption) -> Strategy:
    return Strategy.VIJP if o.fragment_bytes == 0 else Strategy.FRAGMENT


def _finite(o: MoonwalkOption | InvertOption) -> bool:
    return all(math.isfinite(getattr(o, f.name)) for f in dataclasses.fields(o) if f.type == "float")


def _error(options: tuple[MoonwalkOption, ...]) -> float:
    error = worst = 0.0
    for o in options:
        error = math.hypot(o.growth * error, o.local_error)
        worst = max(worst, error)
    return worst


def _invert_error(options: tuple[InvertOption, ...]) -> float:
    """The largest error of any activation, any gradient, and any cotangent, layer by layer from the right."""
    activation = cotangent = 0.0
    errors = []
    for o in options[::-1]:
        activation = math.hypot(o.growth * activation, o.local_error)
        cotangent = math.hypot(cotangent, math.sqrt(o.kink * activation))
        errors += [activation, math.hypot(cotangent, o.gradient_sensitivity * activation)]
        cotangent = math.hypot(cotangent, o.sensitivity * activation)
    return max(*errors, cotangent)


def every_cost(problem: Problem) -> dict[int, int]:
    """The least time at every need that some plan has: `{need_bytes: time_ns}`, slower plans of the same need
    left out; without side conditions."""
    search = _Search(problem)
    out: dict[int, int] = {}
    for need, time in search.stretch(0, len(problem.profile), True, None):
        out[need] = min(time, out.get(need, time))
    return out


class _Search:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.p, self.allowed = problem, problem.profile, problem.strategies
        self.known: dict[tuple[int, int, bool, int | None], set[Cost]] = {}
        self.plain: dict[tuple[int, int], list[Run]] = {}

    def stretch(self, start: int, stop: int, kept: bool, waiting: int | None) -> set[Cost]:
        """All `(peak, time)` of the schedules over `(start, stop]`; `waiting` is K, None at the top level."""
        key = (start, stop, kept, waiting)
        if key in self.known:
            return self.known[key]
        p = self.p
        states: list[set[tuple[bool, int, int, int]]] = [set() for _ in range(stop + 1)]
        states[start].add((kept, 0, 0, 0))
        for s in range(start, stop):
            for e in {state[0] for state in states[s]}:
                for r in range(s + 1, stop + 1):
                    whole = waiting is not None and (s, r) == (start, stop)
                    for peak, held, time, keeps in self.runs(s, r, e, waiting or 0, whole):
                        for e0, held0, peak0, time0 in states[s]:
                            if e0 == e:
                                states[r].add((keeps, held0 + held, max(peak0, held0 + peak), time0 + time))
        out = set()
        for keeps, held, peak, time in states[stop]:
            turn = p.cotangent_bytes[stop] + (0 if keeps else p.activation_bytes[stop])
            out.add((max(peak, held + turn) if waiting is None else peak, time))
        self.known[key] = out
        return out

    def runs(self, s: int, r: int, e: bool, k: int, whole: bool) -> set[tuple[int, int, int, bool]]:
        """`(peak, held, time, keeps_end)` of every run over `(s, r]`; no RECOMPUTE run if it would be the
        `whole` stretch."""
        p = self.p
        a = list(p.activation_bytes)
        a[s] = 0 if e else a[s]
        if (s, r) not in self.plain:
            self.plain[s, r] = list(_plain_runs(self.problem, s, r))
        out = set()
        for run in self.plain[s, r]:
            if run.kind is RunKind.STORE:
                out.add(self._store(run, a, k, e))
            elif run.kind is RunKind.MOONWALK:
                out.add(self._moonwalk(run, a, k, e))
            else:
                out.add(self._invert(run, a, k, e))
        if Strategy.RECOMPUTE in self.allowed and not whole:
            peak = 0
            for layer in range(s + 1, r + 1):
                start = a[s] if layer - 1 > s else 0
                workspace = p.layers[layer - 1].forward_workspace_bytes
                peak = max(peak, k + start + a[layer - 1] + a[layer] + workspace)
            forward = sum(x.forward_ns for x in p.layers[s:r])
            for need, time in self.stretch(s, r, e, p.cotangent_bytes[r]):
                out.add((max(peak, need), a[s], forward + time, False))
        return out

    def _store(self, run: Run, a: list[int], k: int, e: bool) -> tuple[int, int, int, bool]:
        c, s, r = self.p.cotangent_bytes, run.start, run.stop
        o = next(o for o in self.p.layers[s].store if o.name == run.options[0])
        held = o.residual_bytes + (a[s] if o.keeps_input else 0) + (a[r] if o.keeps_output else 0)
        forward = k + a[s] + a[r] + o.residual_bytes + o.forward_workspace_bytes
        back = held + c[r] + c[s] + o.backward_workspace_bytes
        back -= 0 if e and o.keeps_input else o.backward_saving_bytes
        return max(forward, back), held, o.forward_ns + o.backward_ns, o.keeps_output

    def _moonwalk(self, run: Run, a: list[int], k: int, e: bool) -> tuple[int, int, int, bool]:
        d, s, r = self.p.sweep_cotangent_bytes, run.start, run.stop
        layers = self.p.layers
        o = {
            s + 1 + i: next(o for o in layers[s + i].moonwalk if o.name == name)
            for i, name in enumerate(run.options)
        }
        kept = {j: a[j] if o[j].keeps_output or o[j + 1].keeps_input else 0 for j in range(s + 1, r)}
        events = []
        for at in range(s + 1, r + 1):
            q = sum(o[j].residual_bytes for j in range(s + 1, at + 1))
            forward = k + a[s] + q + sum(kept[j] for j in range(s + 1, at - 1)) + a[at]
            forward += (a[at - 1] if at - 1 > s else 0) + o[at].forward_workspace_bytes
            own = 0 if o[at].fragment_is_cotangent else o[at].fragment_bytes
            later = sum(o[j].fragment_bytes for j in range(at + 1, r + 1))
            reverse = a[s] + q + sum(kept[j] for j in range(s + 1, at)) + own + later + d[at] + d[at - 1]
            reverse += (a[at] if o[at].keeps_output else 0) + o[at].reverse_workspace_bytes
            reverse -= o[at].reverse_saving_bytes
            rebuild = a[at - 1] + d[s] + (d[at - 1] if at - 1 > s else 0) + d[at]
            rebuild += own + later + o[at].rebuild_workspace_bytes
            rebuild -= o[at].rebuild_saving_bytes if at - 1 > s else 0
            advance = a[at - 1] + d[s] + d[at] + later
            if at == r:
                advance += o[at].last_workspace_bytes
            else:
                advance += a[at] + o[at].advance_workspace_bytes
                advance -= 0 if e and at - 1 == s else o[at].advance_saving_bytes
            events += [forward, reverse, rebuild, advance]
        held = a[s] + sum(x.residual_bytes for x in o.values()) + sum(kept.values())
        held += a[r] if o[r].keeps_output else 0
        time = sum(x.forward_ns + x.reverse_ns + x.rebuild_ns for x in o.values())
        time += sum(layers[at - 1].forward_ns for at in range(s + 1, r))
        return max(events), held, time, o[r].keeps_output

    def _invert(self, run: Run, a: list[int], k: int, e: bool) -> tuple[int, int, int, bool]:
        c, s, r = self.p.cotangent_bytes, run.start, run.stop
        peak = time = held = 0
        for at, name in enumerate(run.options, start=s + 1):
            o = next(o for o in self.p.layers[at - 1].invert if o.name == name)
            held += o.residual_bytes
            peak = max(peak, k + held + a[at - 1] + a[at] + o.forward_workspace_bytes)
            live = held + a[at] + a[at - 1] + c[at] + c[at - 1] + o.backward_workspace_bytes
            peak = max(peak, live - (0 if e and at - 1 == s else o.backward_saving_bytes))
            time += o.forward_ns + o.backward_ns
        return peak, a[r] + held, time, True
