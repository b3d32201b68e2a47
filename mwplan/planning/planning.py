"""From a profile and a budget to a schedule: solve, replay in the ledger, state what was proved."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwplan.common.errors import ArgumentError, InfeasibleError, MwplanError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.plans.ledger import Replay, buffers, replay, strategies
from mwplan.plans.packing import pack
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import (
    Choice,
    Schedule,
    Solution,
    Status,
    Strategy,
    as_strategies,
    check_allowed,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mwplan.solvers import frontier as frontier_solver

EVERY_STRATEGY = frozenset(Strategy)
#: longer chains are planned with this loss of time aimed at, unless told otherwise
EXACT_LAYERS, DEEP_THIN = 128, 0.02
#: the share of its time that a schedule not proved optimal may lose to become one of fewer different runs
REGULAR = 0.01
#: how many leaner points of a frontier are looked at where the allocator is foreseen to leave holes
LEANER = 16
#: what packing needs more by less than this share is no hole, but small buffers' alignment, which
#: `Profile.table_bytes` has room for
ALIGNED = 0.001
#: Sets of strategies whose plans are worth a look beside that of all: a profile's times are estimates,
#: recomputation alone may turn out faster, and other buffers lie closer or less so.
NARROWER = (
    EVERY_STRATEGY - {Strategy.VIJP, Strategy.FRAGMENT},
    EVERY_STRATEGY - {Strategy.INVERT},
    frozenset({Strategy.STORE, Strategy.RECOMPUTE}),
)


class SolverMismatchError(MwplanError, AssertionError):
    """A solver claimed what the ledger does not confirm: a bug in mwplan, never the user's."""


def plan(
    profile: Profile,
    budget: int | str,
    *,
    max_error: float = 1e-4,
    allowed: Choice = EVERY_STRATEGY,
    pins: Mapping[int, Choice] | None = None,
    host_budget: int | str | None = None,
    max_distinct_runs: int | None = None,
    time_limit_s: float = 30.0,
    seed: int = 0,
    thin: float | None = None,
    regular: float = REGULAR,
    frontier: Frontier | None = None,
) -> Schedule:
    """The fastest schedule whose gradient step fits the budget, with a certificate.

    **Arguments:** `profile`; `budget`, device bytes of the whole step (parameters, input, gradients,
    temporaries), an integer or a text such as "2GiB"; `max_error`, the largest predicted relative error of
    any reconstructed cotangent; `allowed`, the strategies to choose from, or their names ("store"); `pins`, a
    strategy, or a choice of some, forced on some layers (1 to L, from the input); `host_budget`, bytes of the
    host's memory for residuals, where the profile has a way to send them there (`Profile.offloading`);
    `max_distinct_runs`, a limit on different runs (compile time); `time_limit_s` and `seed`, of the integer
    program; `thin`, as in `frontier`, None for `default_thin`; `regular`, as in `Frontier.at`; `frontier`,
    what `mw.frontier` returned for the same profile, `max_error` and `allowed`, where it is there already.
    **Returns:** a `Schedule` that the ledger has replayed; `status` says whether it is proved optimal, else
    `gap` how far it may be from it.
    **Raises:** `InfeasibleError` with the least feasible budget and what binds there; `ArgumentError`.
    **Cost:** the frontier of the chain, and the proof on top (seconds at 100 layers). Chains of 160 layers or
    more with long stretches of identical ones (`solve_frontier`) have no proof but that of
    `mwplan.solvers.relaxed` (a few seconds more, and loose at lean budgets), and with `pins`, `host_budget`
    or `max_distinct_runs` are as slow as any (minutes from 300 layers on).

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> schedule = mw.plan(profile, budget="400KiB")
    >>> schedule.status, schedule.peak_bytes + schedule.fixed_bytes <= 400 * 1024
    (<Status.OPTIMAL: 'optimal'>, True)
    """
    from mwplan.solvers import integer_program

    budget_bytes, chosen = parse_bytes(budget), check_allowed(allowed)
    solved = frontier or _frontier(
        profile, max_error=max_error, allowed=chosen, thin=default_thin(profile) if thin is None else thin
    )
    if solved.profile != profile or solved.max_error != max_error or solved.solved.allowed != chosen:
        raise ArgumentError("`frontier` is of another profile, `max_error` or `allowed`: leave it out")
    if pins is not None and not isinstance(pins, Mapping):
        raise ArgumentError(f'`pins={pins!r}` must say what each layer is to have: {{1: "store"}}')
    room = budget_bytes - solved.always_bytes
    host_bytes = 0 if host_budget is None or host_budget == 0 else parse_bytes(host_budget, "host_budget")
    if host_bytes and not any(layer.offload for layer in profile.layers):
        raise ArgumentError(
            f"`host_budget={host_budget!r}`, but no layer of `profile` can send its residuals to the host: "
            "plan with "
            "`profile.offloading(bytes_per_s)`, the rate of the link"
        )
    least = solved.solved.least_bytes
    fits = least is not None and room >= least
    if not fits and not host_bytes:
        raise solved.infeasible(budget_bytes, budget)
    if room < 0:
        raise InfeasibleError(
            f"`budget={budget!r}` is less than the {show_bytes(solved.always_bytes)} that every schedule "
            "takes for parameters, input and gradients",
            budget_bytes=budget_bytes,
        )
    for at, choice in {} if host_bytes else dict(pins or {}).items():
        if as_strategies(choice, f"pins[{at}]") == {Strategy.OFFLOAD}:
            raise ArgumentError(
                f"`pins` sends layer {at} to the host, where nothing may be kept: give `host_budget`, and "
                "`profile.offloading(bytes_per_s)` for `profile`"
            )
    free = not pins and not host_bytes and max_distinct_runs is None
    solution = integer_program.solve(
        profile,
        max(1, solved.enough(room) if free else room),
        max_error=max_error,
        allowed=chosen,
        pins=dict(pins or {}),
        host_bytes=host_bytes,
        max_distinct_runs=max_distinct_runs,
        time_limit_s=time_limit_s,
        seed=seed,
        frontier=solved.solved,
    )
    if solution.runs is None:
        if solution.status is Status.UNKNOWN:
            raise InfeasibleError(
                f"no schedule found within `time_limit_s={time_limit_s}`, and none excluded: allow more time",
                budget_bytes=budget_bytes,
            )
        least = None if solution.least_bytes is None else solution.least_bytes + solved.always_bytes
        raise InfeasibleError(
            f"`budget={budget!r}` is infeasible with these side conditions"
            + ("" if least is None else f": the leanest schedule under them needs {show_bytes(least)}")
            + (
                f"; without them {show_bytes(solved.least_bytes or 0)} are enough"
                if least is None and solved.least_bytes
                else ""
            ),
            budget_bytes=budget_bytes,
            least_bytes=least,
        )
    if not free:
        schedule = solved.schedule(solution, budget_bytes, free=False)
        if not host_bytes or pins or max_distinct_runs is not None or not fits:
            return schedule
        # The program knows nothing of the time that memory costs, and long chains are thinned without the
        # host.
        alone = solved.at(budget_bytes, regular=regular)
        if alone.time_ns >= schedule.time_ns:
            return schedule
        status = alone.status if alone.time_ns <= schedule.bound_ns else Status.FEASIBLE
        return dataclasses.replace(alone, bound_ns=min(alone.time_ns, schedule.bound_ns), status=status)
    return solved.packed(solved.schedule(solved.simplified(solution, room, regular), budget_bytes), regular)


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
    from mwplan.solvers.frontier import solve_frontier

    if not isinstance(profile, Profile):
        raise ArgumentError(
            f"`profile` is a {type(profile).__name__}: make one with `mw.profile(chain, x)`, or load it with "
            "`Profile.from_json`"
        )
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not max_error >= 0:
        raise ArgumentError(f"`max_error={max_error!r}` must be a number, at least 0 (1e-4 by default)")
    solved = solve_frontier(profile, max_error=float(max_error), allowed=allowed, thin=thin)
    return Frontier(profile, solved, float(max_error))


_frontier = frontier  # `plan` has an argument of that name


def default_thin(profile: Profile) -> float:
    """The loss of time aimed at where nothing is said: 0 up to `EXACT_LAYERS` layers, `DEEP_THIN` beyond,
    where an exact frontier takes minutes to hours."""
    return 0.0 if len(profile) <= EXACT_LAYERS else DEEP_THIN


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
    max_error: float

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
    def points(self) -> tuple[tuple[int, int], ...]:
        """`(total device bytes, ns)` of every schedule that no other beats in both, the time of getting the
        memory included."""
        return tuple((need + self.always_bytes, time) for need, time in self._steps)

    @property
    def always_bytes(self) -> int:
        """What every schedule takes: the fixed part, and the tables of pointers."""
        return self.profile.fixed_bytes + self.profile.table_bytes

    @functools.cached_property
    def _steps(self) -> tuple[tuple[int, int], ...]:
        """The solver's points with the time of getting the memory, less those that are no faster for it than
        a leaner one."""
        steps: list[tuple[int, int]] = []
        for need, time in self.solved.points:
            whole = time + self.profile.fresh_ns(need)
            if not steps or whole < steps[-1][1]:
                steps.append((need, whole))
        return tuple(steps)

    def enough(self, room: int) -> int:
        """The temporaries of the fastest schedule within `room`: where memory costs time, it may be well
        below. `room` where nothing fits."""
        k = bisect.bisect_right(self._steps, room, key=lambda step: step[0])
        return self._steps[k - 1][0] if k and self.profile.fresh_ns(room) else room

    @property
    def least_bytes(self) -> int | None:
        """The least feasible budget, or None where no schedule keeps the error."""
        least = self.solved.least_bytes
        return None if least is None else least + self.always_bytes

    def at(self, budget: int | str, *, regular: float = REGULAR) -> Schedule:
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

    def packed(self, schedule: Schedule, regular: float) -> Schedule:
        """`schedule`, or the fastest leaner one that keeps its budget with the holes that the allocator is
        foreseen to leave; itself if none of `LEANER` does."""
        budget = schedule.budget_bytes or 0
        if schedule.fixed_bytes + schedule.packed_bytes <= budget:
            return schedule
        less = [need for need, _ in self._steps if need + self.profile.table_bytes < schedule.peak_bytes]
        for need in less[: -1 - LEANER : -1]:
            leaner = self.schedule(self.simplified(self.solved.at(need), need, regular), budget)
            if leaner.fixed_bytes + leaner.packed_bytes <= budget:
                status = Status.FEASIBLE if schedule.bound_ns < leaner.time_ns else leaner.status
                more, saved = (
                    schedule.fixed_bytes + schedule.packed_bytes - budget,
                    leaner.time_ns - schedule.time_ns,
                )
                gain = (
                    f"{show_bytes(more)} more would save {show_ns(saved)} ({saved / leaner.time_ns:.1%}): a "
                    "faster schedule was set aside, for the holes that it is "
                    "foreseen to leave between buffers (`mw.fit` compiles it to see)"
                )
                return dataclasses.replace(leaner, bound_ns=schedule.bound_ns, status=status, next_gain=gain)
        return schedule

    def _packed_bytes(self, solution: Solution) -> int:
        """`Schedule.packed_bytes`."""
        if not self.profile.workspaces or len(self.profile) > EXACT_LAYERS:
            return 0
        needs = pack(buffers(self.profile, solution.runs or ())).total_bytes
        if needs < (1 + ALIGNED) * solution.peak_bytes:
            needs = solution.peak_bytes
        return needs + self.profile.table_bytes

    def simplified(self, solution: Solution, room: int, loss: float) -> Solution:
        """`solution`, or one of fewer different runs at a loss of time of at most about `loss`
        (`affordable`); proved optimal, it stays as it is."""
        from mwplan.solvers.regular import affordable, simplify

        if solution.runs is None or solution.status is Status.OPTIMAL:
            return solution
        runs = simplify(self.profile, solution.runs, room, max_error=self.max_error, loss=loss)
        if runs is solution.runs:
            return solution
        found = replay(self.profile, runs)
        before = solution.time_ns + self.profile.fresh_ns(solution.peak_bytes)
        if (
            found.time_ns + found.fresh_ns > (1 + affordable(solution.runs, loss)) * before
        ):  # it takes more memory, which costs time
            return (
                self.simplified(solution, solution.peak_bytes, loss)
                if room > solution.peak_bytes
                else solution
            )
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
        if self.solved.allowed == {Strategy.OFFLOAD}:
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
        leanest = self.solved.at(self.solved.least_bytes)
        binding = str(replay(self.profile, leanest.runs or ()).binding)
        return InfeasibleError(
            f"`budget={budget!r}` is {'infeasible' if proved else 'too small'}: the leanest schedule "
            f"{'' if proved else 'found (the frontier is thinned, so a leaner one may exist) '}needs "
            f"{least:_} bytes ({show_bytes(least)}, of which "
            f"{show_bytes(self.profile.fixed_bytes)} are parameters, input and gradients), in {binding}. "
            f"Raise the budget to that, or lower the batch size{self._more_allowed()}",
            budget_bytes=budget_bytes,
            least_bytes=least,
            binding=binding,
        )

    def _more_allowed(self) -> str:
        """Advice where strategies were left out."""
        left_out = EVERY_STRATEGY - {Strategy.OFFLOAD} - self.solved.allowed
        names = ", ".join(strategy.value for strategy in Strategy if strategy in left_out)
        return f", or allow more strategies ({names} left out)" if names else ""

    def schedule(self, solution: Solution, budget_bytes: int | None = None, *, free: bool = True) -> Schedule:
        """A solver's solution as a schedule, once the ledger agrees with it; `free`, of side conditions.
        Raises `SolverMismatchError`."""
        assert solution.runs is not None
        checked = replay(self.profile, solution.runs)
        _confirm(solution, checked, self.max_error)
        if budget_bytes is not None and checked.peak_bytes + self.always_bytes > budget_bytes:
            raise SolverMismatchError(
                f"{solution.solver} returned a schedule of {checked.peak_bytes} temporary bytes, above the "
                "budget"
            )
        time = checked.time_ns + checked.fresh_ns
        bound = self._bound_ns(solution, budget_bytes, free)
        return Schedule(
            runs=solution.runs,
            strategies=strategies(self.profile, solution.runs),
            fingerprint=self.profile.fingerprint,
            status=Status.FEASIBLE if bound < time else solution.status,
            budget_bytes=budget_bytes,
            fixed_bytes=self.profile.fixed_bytes,
            input_bytes=self.profile.activation_bytes[0],
            peak_bytes=checked.peak_bytes + self.profile.table_bytes,
            packed_bytes=self._packed_bytes(solution),
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
        from mwplan.solvers.runs import fastest_ns

        fresh_ns = self.profile.fresh_ns
        room = solution.peak_bytes if budget_bytes is None else budget_bytes - self.always_bytes
        if not fresh_ns(room):
            return solution.bound_ns
        away = any(layer.offload for layer in self.profile.layers)  # which the frontier does not know
        least = 0 if away else fresh_ns(self.solved.least_bytes or 0)
        if not free:
            return solution.bound_ns + least
        if self.solved.thin and solution.solver.startswith(
            "frontier"
        ):  # the bounds of a thinned frontier cost as much again
            return fastest_ns(self.profile) + least
        return min(time + fresh_ns(need) for need, time in self.solved.bound_points if need <= room)

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


def scheduled(profile: Profile, solution: Solution, max_error: float) -> Schedule:
    """A baseline's solution as a schedule, its costs from the ledger."""
    assert solution.runs is not None
    found = replay(profile, solution.runs)
    return Schedule(
        runs=solution.runs,
        strategies=strategies(profile, solution.runs),
        fingerprint=profile.fingerprint,
        status=solution.status,
        fixed_bytes=profile.fixed_bytes,
        input_bytes=profile.activation_bytes[0],
        peak_bytes=found.peak_bytes + profile.table_bytes,
        time_ns=found.time_ns + found.fresh_ns,
        error=found.error,
        max_error=max_error,
        report_scales=found.report_scales,
        solver=solution.solver,
    )


def familiar(profile: Profile, *, max_error: float, allowed: frozenset[Strategy]) -> list[Schedule]:
    """What one would try by hand, of the allowed strategies: every layer stored, which is plain
    backpropagation; inversion wherever a layer allows it; moonwalk runs as long as the error allows."""
    from mwplan.solvers import baselines

    made = [
        baselines.store_all(profile),
        baselines.all_invert(profile, max_error=max_error),
        baselines.all_moonwalk(profile, max_error=max_error),
    ]
    found = [scheduled(profile, solution, max_error) for solution in made if solution.runs is not None]
    return [one for one in found if allowed.issuperset(one.strategies)]


def _confirm(solution: Solution, checked: Replay, max_error: float) -> None:
    claims = (solution.peak_bytes, solution.time_ns)
    found = (checked.peak_bytes, checked.time_ns)
    # A solver may claim a need it rounded up, never one that is too small.
    if claims[0] < found[0] or claims[1] != found[1]:
        raise SolverMismatchError(
            f"{solution.solver} claims (bytes, ns) = {claims} and the ledger finds {found}: please report "
            "this profile"
        )
    if checked.error > max_error * (1 + 1e-9) or math.isnan(checked.error):
        raise SolverMismatchError(
            f"{solution.solver} returned a schedule with predicted error {checked.error}, above {max_error}"
        )
