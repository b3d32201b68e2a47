"""A problem with its side conditions made ready for search: the frontier, and staircases under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Run, RunKind
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.frontier import Frontier, general_frontier, solve_frontier
from mwplan.solvers.pareto import INF
from mwplan.solvers.problem import Problem
from mwplan.solvers.tables import Tables
from mwplan.solvers.top import Top


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """A problem, its frontier, and the staircases of all suffixes under its pins; `top` is None where the
    frontier has none (long stretches of identical layers) and there are no side conditions: it is the
    answer."""

    problem: Problem
    frontier: Frontier
    top: Top | None

    @classmethod
    def make(cls, problem: Problem, frontier: Frontier | None) -> Conditioned:
        """`frontier`: of the same profile and options, if known. Raises `ArgumentError` where it is not."""
        if frontier is None:
            frontier = solve_frontier(problem.unconditional())
        known = frontier.problem
        if (known.profile, known.max_error, known.strategies) != (
            problem.profile,
            problem.max_error,
            problem.strategies,
        ):
            raise ArgumentError(
                "`frontier` was made from another profile, `max_error` or `allowed`: leave it out"
            )
        if frontier.top is None and problem.has_conditions:
            # Side conditions tell layers apart.
            frontier = general_frontier(known)
        if frontier.top is None:
            return cls(problem=problem, frontier=frontier, top=None)
        tables, depth = frontier.top.tables, problem.max_recompute_depth
        if depth is not None and tables.depth not in (0, depth):
            raise ArgumentError("`frontier` was made with another `max_recompute_depth`: leave it out")
        if not problem.has_conditions:
            return cls(problem=problem, frontier=frontier, top=frontier.top)
        narrowed = problem.pins or problem.forbid or problem.offloads
        candidates = Candidates(problem) if narrowed else tables.candidates
        return cls(problem=problem, frontier=frontier, top=Top(tables, candidates, closing=True))

    @property
    def staircases(self) -> Top:
        """The staircases of all suffixes, under the pins."""
        assert self.top is not None
        return self.top

    @property
    def candidates(self) -> Candidates:
        """The runs outside RECOMPUTE runs, under the pins."""
        return self.staircases.candidates

    @property
    def tables(self) -> Tables:
        """The inner schedules of RECOMPUTE runs."""
        return self.staircases.tables

    @property
    def host_bytes(self) -> int:
        """Of OFFLOAD runs; 0 where there are none."""
        return self.problem.host_bytes if self.problem.offloads else 0

    @property
    def limited(self) -> bool:
        """Whether there is a side condition that the staircases do not know."""
        return self.problem.max_distinct_runs is not None or self.host_bytes > 0

    def at_host_price(self, price: int) -> Candidates:
        """The candidates with `price` ns a MiB of the host's memory on top of times; `INF`: without OFFLOAD
        runs."""
        if price >= INF:
            return Candidates(dataclasses.replace(self.problem, host_bytes=0))
        profile = self.problem.profile
        priced = {
            id(layer): dataclasses.replace(
                layer,
                offload=tuple(
                    dataclasses.replace(o, forward_ns=o.forward_ns + host_price_ns(o.host_bytes, price))
                    for o in layer.offload
                ),
            )
            for layer in profile.layers
        }
        layers = tuple(priced[id(layer)] for layer in profile.layers)
        profile = dataclasses.replace(profile, layers=layers)
        return Candidates(dataclasses.replace(self.problem, profile=profile))

    # -- about runs

    def host_of(self, run: Run) -> int:
        """Bytes that an outermost run has in the host's memory."""
        if run.kind is not RunKind.OFFLOAD:
            return 0
        options = self.problem.profile.layers[run.start].offload
        return next(o.host_bytes for o in options if o.name == run.options[0])

    def keeps_end(self, run: Run) -> bool:
        """Whether an outermost run keeps its end."""
        layer = self.problem.profile.layers[run.stop - 1]
        if run.kind in (RunKind.STORE, RunKind.MOONWALK):
            options: Iterable[Any] = layer.store if run.kind is RunKind.STORE else layer.moonwalk
            return any(o.keeps_output for o in options if o.name == run.options[-1])
        return run.kind is RunKind.INVERT

    def signature(self, run: Run, kept: bool) -> tuple[Any, ...]:
        """Equal for runs that do the same to equal layers and enter them alike."""

        def shape(run: Run, base: int) -> tuple[Any, ...]:
            inner = tuple(shape(x, base) for x in run.inner)
            return (run.kind, run.start - base, run.stop - base, run.options, inner)

        p, at = self.problem.profile, run.start
        start = (p.activation_bytes[at], p.cotangent_bytes[at], p.sweep_cotangent_bytes[at], kept)
        return (start, tuple(self.candidates.layer_class[at + 1 : run.stop + 1]), shape(run, at))


def host_price_ns(host_bytes: int, price: int) -> int:
    """What so many bytes cost at `price` ns a MiB."""
    return host_bytes * price >> 20
