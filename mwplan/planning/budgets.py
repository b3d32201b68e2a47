"""The least time at every budget, and the schedule at each of them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwplan.common.errors import ArgumentError, InfeasibleError, ScheduleMismatchError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.planning.schedules import RECOMPUTATION, SolverMismatchError, baseline_schedules, confirmed
from mwplan.plans.ledger import buffers, replay, strategies
from mwplan.plans.packing import pack
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Schedule, Solution, Status, Strategy
from mwplan.report import page
from mwplan.report.content import CompiledPeak, Subject
from mwplan.solvers import frontier as frontier_solver
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.predictions import fastest_ns
from mwplan.solvers.problem import EVERY_STRATEGY, Problem
from mwplan.solvers.regular import affordable, simplify
from mwplan.solvers.tuning import TUNING, Tuning

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def frontier(
    profile: Profile,
    *,
    max_error: float = 1e-4,
    allowed: Choice = EVERY_STRATEGY,
    thin: float = 0.0,
) -> Frontier:
    """Every budget at once: the exact trade of memory against time.

    **Arguments:** as `plan`; `thin`, the relative loss of time aimed at for speed, measured and not proved
    beforehand (0 is exact).
    **Raises:** `ArgumentError`.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> points = mw.frontier(profile).points  # (total bytes, ns)
    >>> all(a[0] < b[0] and a[1] > b[1] for a, b in zip(points, points[1:]))
    True
    """
    if not isinstance(profile, Profile):
        raise ArgumentError(
            f"`profile` is a {type(profile).__name__}: make one with `mw.profile(chain, x)`, or load it with "
            "`Profile.from_json`"
        )
    problem = Problem(profile=profile, max_error=max_error, allowed=allowed, thin=thin)
    return Frontier(profile, solve_frontier(problem))


def default_thin(profile: Profile) -> float:
    """The loss of time aimed at where nothing is said: 0 up to `Tuning.exact_layers` layers, beyond, where an
    exact frontier takes minutes to hours, `Tuning.deep_thin`."""
    return 0.0 if len(profile) <= TUNING.exact_layers else TUNING.deep_thin


def frontier_for(profile: Profile, schedule: Schedule) -> Frontier:
    """Every budget at once, as it was solved for a schedule: at its tolerance, thinned where chains are
    long."""
    return frontier(profile, max_error=schedule.max_error, thin=default_thin(profile))


@dataclass(frozen=True)
class Frontier:
    """The least time at every budget. `points` are `(total bytes, ns)`, cheapest memory first.

    >>> frontier = mw.frontier(mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100"))
    >>> least_bytes, most_ns = frontier.points[0]
    >>> least_bytes == frontier.least_bytes
    True
    >>> schedule = frontier.at(least_bytes)
    >>> schedule.time_ns == most_ns
    True
    """

    profile: Profile
    solved: frontier_solver.Frontier

    @property
    def max_error(self) -> float:
        """The largest predicted error of any of them."""
        return self.solved.problem.max_error

    def __str__(self) -> str:
        if not self.points:
            return f"frontier of {len(self.profile)} layers: no schedule keeps `max_error={self.max_error}`"
        ends = " to ".join(
            f"{show_bytes(total)} in {show_ns(ns)}" for total, ns in (self.points[0], self.points[-1])
        )
        return (
            f"frontier of {len(self.profile)} layers: {len(self.points)} schedules, from {ends}\n"
            "  `frontier.at(budget)` is one of them; `frontier.table()` and `frontier.plot()` show all"
        )

    @property
    def tuning(self) -> Tuning:
        """What decides which of the schedules is taken."""
        return self.solved.problem.tuning

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """`(total device bytes, ns)` of every schedule that no other beats in both, the time of getting the
        memory included."""
        return tuple((need + self.always_bytes, time) for need, time in self._steps)

    @property
    def always_bytes(self) -> int:
        """What every schedule takes: the fixed part, and the tables of pointers."""
        return self.profile.fixed_bytes + self.profile.beside_bytes

    @functools.cached_property
    def _steps(self) -> tuple[tuple[int, int], ...]:
        """The solver's points with the time of getting the memory, less those that are no faster for it than
        one of less memory."""
        steps: list[tuple[int, int]] = []
        for need, time in self.solved.points:
            whole = time + self.profile.first_touch_ns(need)
            if not steps or whole < steps[-1][1]:
                steps.append((need, whole))
        return tuple(steps)

    def enough(self, room: int) -> int:
        """The temporaries of the fastest schedule within `room`: where memory costs time, it may be well
        below. `room` where nothing fits."""
        k = bisect.bisect_right(self._steps, room, key=lambda step: step[0])
        return self._steps[k - 1][0] if k and self.profile.first_touch_ns(room) else room

    @property
    def least_bytes(self) -> int | None:
        """The least feasible budget, or None where no schedule keeps the error."""
        least = self.solved.least_bytes
        return None if least is None else least + self.always_bytes

    def at(self, budget: int | str, *, regular: float = TUNING.regular_loss) -> Schedule:
        """The fastest schedule at `budget`, by the frontier alone.

        `regular`: of a schedule that is not proved optimal, the share of its time that may be lost for one of
        fewer different runs where layers repeat (several times as much where it would compile to hundreds of
        loops): these compile faster, in a time that grows with the number of loops. **Raises:**
        `InfeasibleError`.
        """
        budget_bytes = parse_bytes(budget)
        room = budget_bytes - self.always_bytes
        solution = self.solved.at(self.enough(room))
        if solution.runs is None:
            raise self.infeasible(budget_bytes, budget)
        return self.packed(self.schedule(self.simplified(solution, room, regular), budget_bytes), regular)

    def bare(self, budget_bytes: int) -> Schedule:
        """As `at`, whatever fragmentation is predicted (`Schedule.packed_bytes`): the frontier's point."""
        room = budget_bytes - self.always_bytes
        solution = self.solved.at(self.enough(room))
        if solution.runs is None:
            raise self.infeasible(budget_bytes, budget_bytes)
        return self.schedule(self.simplified(solution, room, TUNING.regular_loss), budget_bytes)

    def packed(self, schedule: Schedule, regular: float) -> Schedule:
        """`schedule`, or the fastest one of less memory that keeps its budget with the predicted
        fragmentation; itself if none of `Tuning.smaller_points` does."""
        budget = schedule.budget_bytes or 0
        if schedule.fixed_bytes + schedule.packed_bytes <= budget:
            return schedule
        less = [need for need, _ in self._steps if need + self.profile.beside_bytes < schedule.peak_bytes]
        for need in less[: -1 - self.tuning.smaller_points : -1]:
            smaller = self.schedule(self.simplified(self.solved.at(need), need, regular), budget)
            if smaller.fixed_bytes + smaller.packed_bytes <= budget:
                status = Status.FEASIBLE if schedule.bound_ns < smaller.time_ns else smaller.status
                more = schedule.fixed_bytes + schedule.packed_bytes - budget
                saved = smaller.time_ns - schedule.time_ns
                gain = (
                    f"{show_bytes(more)} more would save {show_ns(saved)} ({saved / smaller.time_ns:.1%}): a "
                    "faster schedule was set aside, for its predicted fragmentation "
                    "(`mw.fit` compiles it to see)"
                )
                return dataclasses.replace(smaller, bound_ns=schedule.bound_ns, status=status, next_gain=gain)
        return schedule

    def _packed_bytes(self, solution: Solution) -> int:
        """`Schedule.packed_bytes`."""
        if not self.profile.workspaces or len(self.profile) > self.tuning.exact_layers:
            return 0
        needs = pack(buffers(self.profile, solution.runs or ())).total_bytes
        if needs < (1 + self.tuning.alignment_share) * solution.peak_bytes:
            needs = solution.peak_bytes
        return needs + self.profile.beside_bytes

    def simplified(self, solution: Solution, room: int, loss: float) -> Solution:
        """`solution`, or one of fewer different runs at a loss of time of at most about `loss`
        (`affordable`); proved optimal, it stays as it is."""
        if solution.runs is None or solution.status is Status.OPTIMAL:
            return solution
        problem = dataclasses.replace(self.solved.problem, profile=self.profile, budget_bytes=room)
        runs = simplify(problem, solution.runs, loss)
        if runs is solution.runs:
            return solution
        found = replay(self.profile, runs)
        before = solution.time_ns + self.profile.first_touch_ns(solution.peak_bytes)
        if found.time_ns + found.first_touch_ns > (1 + affordable(solution.runs, loss, self.tuning)) * before:
            # It takes more memory, which costs time.
            more = room > solution.peak_bytes
            return self.simplified(solution, solution.peak_bytes, loss) if more else solution
        return dataclasses.replace(
            solution,
            runs=runs,
            time_ns=found.time_ns,
            peak_bytes=found.peak_bytes,
            error=found.error,
            solver=f"{solution.solver}, regular",
        )

    def infeasible(self, budget_bytes: int, budget: int | str) -> InfeasibleError:
        """The error for a budget below the least feasible one: says that, and which event needs it."""
        least = self.least_bytes
        proved = self.solved.at(budget_bytes - self.always_bytes).status is Status.INFEASIBLE
        if self.solved.problem.strategies == {Strategy.OFFLOAD}:
            return InfeasibleError(
                "OFFLOAD alone is allowed, which needs `host_budget`, and `profile.offloading(bytes_per_s)` "
                "for `profile`",
                budget_bytes=budget_bytes,
            )
        if least is None or self.solved.least_bytes is None:
            return InfeasibleError(
                f"no schedule {'keeps' if proved else 'was found that keeps'} `max_error={self.max_error}` "
                "with the strategies allowed, at any budget",
                budget_bytes=budget_bytes,
            )
        smallest = self.solved.at(self.solved.least_bytes)
        binding = str(replay(self.profile, smallest.runs or ()).binding)
        return InfeasibleError(
            f"`budget={budget!r}` is {'infeasible' if proved else 'too small'}: the least-memory schedule "
            f"{'' if proved else 'found (the frontier is thinned, so a smaller one may exist) '}needs "
            f"{least:_} bytes ({show_bytes(least)}, of which "
            f"{show_bytes(self.profile.fixed_bytes)} are {self.profile.fixed_parts}), in {binding}. "
            f"Raise the budget to that, or lower the batch size{self._more_allowed()}. This is "
            "by prediction: `mw.fit` compiles, and may need less",
            budget_bytes=budget_bytes,
            least_bytes=least,
            binding=binding,
        )

    def _more_allowed(self) -> str:
        """Advice where strategies were left out."""
        left_out = EVERY_STRATEGY - {Strategy.OFFLOAD} - self.solved.problem.strategies
        names = ", ".join(strategy.value for strategy in Strategy if strategy in left_out)
        return f", or allow more strategies ({names} left out)" if names else ""

    def schedule(self, solution: Solution, budget_bytes: int | None = None, *, free: bool = True) -> Schedule:
        """A solver's solution as a schedule, once the ledger agrees with it; `free`, of side conditions.
        Raises `SolverMismatchError`."""
        assert solution.runs is not None
        checked = confirmed(self.profile, solution, self.max_error)
        if budget_bytes is not None and checked.peak_bytes + self.always_bytes > budget_bytes:
            raise SolverMismatchError(
                f"{solution.solver} returned a schedule of {checked.peak_bytes} temporary bytes, above the "
                "budget"
            )
        time = checked.time_ns + checked.first_touch_ns
        bound = self._bound_ns(solution, budget_bytes, free)
        return Schedule(
            runs=solution.runs,
            strategies=strategies(self.profile, solution.runs),
            fingerprint=self.profile.fingerprint,
            status=Status.FEASIBLE if bound < time else solution.status,
            budget_bytes=budget_bytes,
            fixed_bytes=self.profile.fixed_bytes,
            input_bytes=self.profile.activation_bytes[0],
            peak_bytes=checked.peak_bytes + self.profile.beside_bytes,
            packed_bytes=self._packed_bytes(solution),
            stored_bytes=self.profile.stored_bytes,
            host_bytes=checked.host_bytes,
            time_ns=time,
            bound_ns=bound,
            error=checked.error,
            max_error=self.max_error,
            least_bytes=None if checked.host_bytes else self.least_bytes,
            binding=f"{checked.binding}: {show_bytes(checked.binding.live_bytes)} alive",
            next_gain=self._next_gain(checked.peak_bytes, time),
            report_scales=checked.report_scales,
            solver=solution.solver,
            stats=solution.stats,
        )

    def _bound_ns(self, solution: Solution, budget_bytes: int | None, free: bool) -> int:
        """No schedule within the budget is faster, the time of getting the memory included."""
        first_touch_ns = self.profile.first_touch_ns
        room = solution.peak_bytes if budget_bytes is None else budget_bytes - self.always_bytes
        if not first_touch_ns(room):
            return solution.bound_ns
        offloads = any(layer.offload for layer in self.profile.layers)  # which the frontier does not know
        least = 0 if offloads else first_touch_ns(self.solved.least_bytes or 0)
        if not free:
            return solution.bound_ns + least
        if self.solved.problem.thin and solution.solver.startswith("frontier"):
            # The bounds of a thinned frontier cost as much again.
            return fastest_ns(self.profile) + least
        return min(time + first_touch_ns(need) for need, time in self.solved.bound_points if need <= room)

    def _next_gain(self, peak_bytes: int, time_ns: int) -> str:
        for need, time in self._steps:
            if time < time_ns and need > peak_bytes:
                more, saved = need - peak_bytes, time_ns - time
                return f"{show_bytes(more)} more would save {show_ns(saved)} ({saved / time_ns:.1%})"
        return "none would make it faster"

    def table(self) -> pd.DataFrame:
        """One row a point: total bytes, temporary bytes, ns, and time relative to the fastest."""
        import pandas as pd

        frame = pd.DataFrame(self.points, columns=["total_bytes", "time_ns"])
        frame["temporary_bytes"] = frame["total_bytes"] - self.profile.fixed_bytes
        frame["relative_time"] = frame["time_ns"] / max(1, min((t for _, t in self.points), default=1))
        return frame

    def plot(self, ax: Axes | None = None, **line: Any) -> Axes:
        """Draws time against memory as a step line; returns the axes."""
        from mwplan.common.plots import plot_frontier

        return plot_frontier(self.points, ax, **line)

    def report(
        self,
        to: str | Path,
        schedule: Schedule | None = None,
        *,
        plans: int = 24,
        title: str = "",
        compiled: CompiledPeak | None = None,
        measured: Sequence[Sequence[str]] = (),
    ) -> Path:
        """Writes a page to look at: time against memory with a budget to drag, and of the plan at each budget
        its strategies by layer, its memory over the step, its peak and what is proved.

        **Arguments:** `to`, the file, one that needs nothing else and no network; `schedule`, one for this
        frontier's profile, to be among the plans and shown first; `plans`, how many others there are, spread
        evenly by ratio over the budgets, each solved here; `title`; `compiled`, what its program takes;
        `measured`, rows of a table of what was measured, the header first.
        **Returns:** the path. **Raises:** `ArgumentError`; `ScheduleMismatchError`; `MwplanError` where
        plotly is not installed (`pip install "mwplan[report]"`); `InfeasibleError` where there is no plan.
        **Cost:** a second frontier, of recomputation alone, and a replay of each plan; a file of 5 MB.

        >>> import tempfile
        >>> frontier = mw.frontier(mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         page = frontier.report(f"{folder}/plan.html", frontier.at("400KiB"))
        ...     except mw.MwplanError as missing:
        ...         assert "mwplan[report]" in str(missing)
        """
        page.check_target(to)
        if isinstance(plans, bool) or not isinstance(plans, int) or plans < 1:
            raise ArgumentError(f"`plans={plans!r}` must be a number of plans, at least 1")
        ours = self.profile.fingerprint
        if schedule is not None and schedule.fingerprint not in ("", ours) and ours:
            raise ScheduleMismatchError("`schedule` is of another profile than this frontier: plan again")
        some, chosen = self._shown(plans, schedule)
        problem = self.solved.problem
        both = problem.strategies & RECOMPUTATION
        alone: tuple[tuple[int, int], ...] = ()
        if both and both != problem.strategies:
            alone = frontier(self.profile, max_error=self.max_error, allowed=both, thin=problem.thin).points
        plain = baseline_schedules(
            self.profile, max_error=self.max_error, allowed=frozenset({Strategy.STORE})
        )
        return page.write(
            to,
            Subject(
                profile=self.profile,
                points=self.points,
                schedules=some,
                chosen=chosen,
                recomputation=alone,
                backpropagation=(plain[0].total_bytes, plain[0].time_ns),
                compiled=compiled,
                title=title,
                measured=tuple(tuple(row) for row in measured),
            ),
        )

    def _shown(self, plans: int, schedule: Schedule | None) -> tuple[tuple[Schedule, ...], int]:
        """The schedules of a report, least budget first, and which is shown at first: `schedule`, or the
        middle one."""
        totals = [total for total, _ in self.points]
        if not totals:
            if schedule is None:
                raise self.infeasible(1, 1)
            return (schedule,), 0
        ratio = totals[-1] / totals[0]
        aims = [totals[0] * ratio ** (k / max(1, plans - 1)) for k in range(plans)]
        picked = {totals[max(0, bisect.bisect_right(totals, aim * (1 + 1e-9)) - 1)] for aim in aims}
        found = {one.runs: one for one in (self.bare(total) for total in sorted(picked, reverse=True))}
        if schedule is not None:
            found[schedule.runs] = schedule
        some = sorted(found.values(), key=lambda one: one.budget_bytes or one.total_bytes)
        return tuple(some), len(some) // 2 if schedule is None else some.index(schedule)
