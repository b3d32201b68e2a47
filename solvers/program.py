r"""The integer program over some runs, in CP-SAT.

Over the nodes `(i, e)` of the chain, with a binary `z_c` for each candidate run `c` from `(s, e)` to
`(j, e')` of peak `P_c`, held bytes `H_c`, time `t_c`:

    minimise    sum t_c z_c
    subject to
      one path through the nodes     sum_{c out of n} z_c - sum_{c into n} z_c = [n = (0, 1)] - [n = (L, .)]
      each layer i, all its events   sum_{c ends before i} H_c z_c + sum_{c covers i} P_c z_c <= M
      the turn                       sum H_c z_c + sum_{c into (L, e)} turn_e z_c <= M
      at most D distinct runs        z_c <= y_k for c in class k,  sum y_k <= D          if asked
      OFFLOAD runs                   sum G_c z_c <= host memory          all are offloaded at the turn

Exactly one run covers layer `i`, so no big-M is needed: for the run that covers `i` the row reads
`H(left of it) + P_c <= M`. In the other direction `M` is a variable, minimised subject to `sum t_c z_c <= T`.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Solution, Status
from mwplan.solvers.candidates import Node
from mwplan.solvers.columns import Columns
from mwplan.solvers.conditions import Conditioned
from mwplan.solvers.pareto import Ints, value_at

if TYPE_CHECKING:
    from ortools.sat.python import cp_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What schedules are looked for: of at most `budget` bytes and `theta` ns, the fastest, or that of
    `least_bytes`; until `deadline`, on the monotonic clock."""

    budget: int
    theta: int
    least_bytes: bool
    deadline: float

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return clock.monotonic() > self.deadline


class Program:
    """The model of one set of columns."""

    def __init__(self, asked: Conditioned, columns: Columns, limits: Limits) -> None:
        from ortools.sat.python import cp_model

        self.asked, self.columns, self.limits = asked, columns, limits
        self.linear, c = cp_model.LinearExpr, asked.candidates
        self.held, self.peak, self.time = (
            np.array(x, dtype=np.int64) for x in (columns.held, columns.peak, columns.time)
        )
        turns = [c.turn_bytes(e) if i == c.size else 0 for i, e in columns.target]
        self.turn: Ints = np.array(turns, dtype=np.int64)
        # Bytes only enter comparisons of sums, so a common divisor goes.
        self.unit = max(1, int(np.gcd.reduce(np.concatenate([self.held, self.peak, self.turn]))))
        self._check_sums()
        self.model = cp_model.CpModel()
        self.z = [self.model.new_bool_var(f"z{k}") for k in range(len(columns))]
        cap = limits.budget // self.unit
        self.cap: Any = self.model.new_int_var(0, cap, "peak") if limits.least_bytes else cap

    def _check_sums(self) -> None:
        """CP-SAT's sums must not overflow."""
        total = sum(sum(x.tolist()) for x in (self.held, self.peak, self.turn))
        if total // self.unit >= 2**61 or sum(self.time.tolist()) >= 2**61:
            raise ArgumentError(
                f"`profile`: the {len(self.columns)} runs of the integer program sum to {total} bytes, past "
                "2^61: state bytes and times in larger units"
            )

    def build(self) -> bool:
        """Adds all constraints and the objective; whether there was time for that."""
        self._add_flow()
        if not self._add_layers():
            return False
        total = self.linear.weighted_sum(self.z, self.time.tolist())
        self.model.add(total <= min(self.limits.theta, 2**61))
        if not self._add_distinct():
            return False
        self._add_host()
        self.model.minimize(self.cap if self.limits.least_bytes else total)
        for k in self._hint():
            self.model.add_hint(self.z[k], 1)
        return True

    def _add_flow(self) -> None:
        """One path through the nodes."""
        out: dict[Node, list[Any]] = {}
        into: dict[Node, list[Any]] = {}
        for z, source, target in zip(self.z, self.columns.source, self.columns.target):
            out.setdefault(source, []).append(z)
            into.setdefault(target, []).append(z)
        for node in {*out, *into}:
            if node[0] == self.asked.candidates.size:
                continue
            flow = sum(out.get(node, [])) - sum(into.get(node, []))
            self.model.add(flow == (1 if node == (0, True) else 0))

    def _add_layers(self) -> bool:
        """Each layer's events, and the turn; False if time is up."""
        size = self.asked.candidates.size
        start = np.array([s for s, _ in self.columns.source])
        stop = np.array([j for j, _ in self.columns.target])
        rows: set[bytes] = set()
        for layer in range(size + 1):
            covers = (start <= layer) & (stop > layer) if layer < size else stop == size
            own = self.peak if layer < size else self.turn
            weight = np.where(stop <= layer, self.held, 0) + np.where(covers, own, 0)
            if self.limits.late:
                return False
            if weight.tobytes() in rows:
                continue
            rows.add(weight.tobytes())
            used = np.flatnonzero(weight)
            terms = self.linear.weighted_sum([self.z[k] for k in used], (weight[used] // self.unit).tolist())
            self.model.add(terms <= self.cap)
        return True

    def _add_distinct(self) -> bool:
        """At most so many distinct runs; False if time is up."""
        limit = self.asked.problem.max_distinct_runs
        if limit is None:
            return True
        classes: dict[Any, list[int]] = {}
        for k in range(len(self.columns)):
            if self.limits.late:
                return False
            key = self.asked.signature(self.columns.run(self.asked, k), self.columns.source[k][1])
            classes.setdefault(key, []).append(k)
        y = []
        for index, members in enumerate(classes.values()):
            y.append(self.model.new_bool_var(f"y{index}"))
            for k in members:
                self.model.add_implication(self.z[k], y[-1])
        self.model.add(sum(y) <= limit)
        return True

    def _add_host(self) -> None:
        """The host's memory."""
        host = np.array(self.columns.host, dtype=np.int64)
        if int(host.sum()) > self.asked.host_bytes:
            share = max(1, int(np.gcd.reduce(host)))
            offloaded = np.flatnonzero(host)
            used = self.linear.weighted_sum(
                [self.z[k] for k in offloaded], (host[offloaded] // share).tolist()
            )
            self.model.add(used <= self.asked.host_bytes // share)

    def _hint(self) -> list[int]:
        """Columns of one fastest schedule within the budget by the staircases: the warm start."""
        columns, nodes = self.columns, self.asked.staircases.nodes
        by_source: dict[Node, list[int]] = {}
        for k, source in enumerate(columns.source):
            by_source.setdefault(source, []).append(k)
        out: list[int] = []
        node: Node = (0, True)
        rest = self.limits.budget
        while node[0] < self.asked.candidates.size:
            goal = value_at(*nodes[node], rest)
            for k in by_source.get(node, ()):
                after = nodes[columns.target[k]]
                spent = columns.time[k] + value_at(*after, rest - columns.held[k])
                if columns.peak[k] <= rest and spent == goal:
                    out.append(k)
                    rest -= columns.held[k]
                    node = columns.target[k]
                    break
            else:
                return []
        return out

    def solve(self) -> tuple[Solution, dict[str, float]]:
        """The solution, and what it took."""
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(0.01, self.limits.deadline - clock.monotonic())
        solver.parameters.num_workers = self.asked.problem.workers
        solver.parameters.random_seed = self.asked.problem.seed
        solver.parameters.log_search_progress = False
        status = solver.solve(self.model)
        stats = {
            "columns": float(len(self.columns)),
            "branches": float(solver.num_branches),
            "conflicts": float(solver.num_conflicts),
        }
        if status == cp_model.MODEL_INVALID:
            raise ArgumentError(
                f"the integer program overflows ({self.model.validate()}): state bytes and times in larger "
                "units"
            )
        if status == cp_model.INFEASIBLE:
            return Solution(status=Status.INFEASIBLE), stats
        # CP-SAT's bound is a float near an integer: an integer objective is at least its ceiling, less
        # rounding.
        bound = solver.best_objective_bound
        bound = max(0, int(np.ceil(bound - 1e-6 * max(1.0, abs(bound)) ** 0.5)))
        bound *= self.unit if self.limits.least_bytes else 1
        if status == cp_model.UNKNOWN:
            return Solution(status=Status.UNKNOWN, bound_ns=bound), stats
        return self._solution(
            solver, Status.OPTIMAL if status == cp_model.OPTIMAL else Status.FEASIBLE, bound
        ), stats

    def _solution(self, solver: cp_model.CpSolver, status: Status, bound: int) -> Solution:
        """What the solver found."""
        columns = self.columns
        found = (k for k in range(len(columns)) if solver.boolean_value(self.z[k]))
        chosen = sorted(found, key=lambda k: columns.source[k])
        before, need = 0, 0
        for k in chosen:
            need = max(need, before + columns.peak[k])
            before += columns.held[k]
        return Solution(
            status=status,
            runs=tuple(columns.run(self.asked, k) for k in chosen),
            time_ns=sum(columns.time[k] for k in chosen),
            peak_bytes=max(need, before + int(self.turn[chosen[-1]])),
            bound_ns=bound,
        )


def solve_columns(asked: Conditioned, columns: Columns, limits: Limits, stats: dict[str, float]) -> Solution:
    """The program over `columns`, solved: minimises time, or the peak. UNKNOWN if `deadline` comes first.
    Adds to `stats`."""
    if not len(columns):
        return Solution(status=Status.INFEASIBLE)
    program = Program(asked, columns, limits)
    if not program.build():
        return Solution(status=Status.UNKNOWN)
    solution, took = program.solve()
    stats.update(took)
    return solution
