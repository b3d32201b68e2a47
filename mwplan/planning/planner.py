"""One budget: the fastest schedule that fits it, with a certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mwplan.common.errors import ArgumentError, InfeasibleError
from mwplan.common.sizes import parse_bytes, show_bytes
from mwplan.planning.budgets import Frontier, default_thin
from mwplan.planning.budgets import frontier as frontier_of
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Schedule, Solution, Status, Strategy, as_strategies, check_allowed
from mwplan.solvers import integer_program
from mwplan.solvers.problem import EVERY_STRATEGY, Problem
from mwplan.solvers.tuning import TUNING


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
    regular: float = TUNING.regular_loss,
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
    **Returns:** a `Schedule`, replayed by the ledger; `status` says if it is optimal, or `gap` how close.
    **Raises:** `InfeasibleError` with the least feasible budget and what binds there; `ArgumentError`.
    **Cost:** the frontier and the proof: seconds at 100 layers. Long chains of identical layers are proved by
    `mwplan.solvers.relaxed` alone; with `pins`, `host_budget` or `max_distinct_runs` they take minutes.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> mw.plan(profile, budget="400KiB").status
    <Status.OPTIMAL: 'optimal'>
    """
    budget_bytes, chosen = parse_bytes(budget), check_allowed(allowed)
    solved = frontier or frontier_of(
        profile, max_error=max_error, allowed=chosen, thin=default_thin(profile) if thin is None else thin
    )
    known = solved.solved.problem
    if (solved.profile, known.max_error, known.strategies) != (profile, max_error, chosen):
        raise ArgumentError("`frontier` is of another profile, `max_error` or `allowed`: leave it out")
    host_bytes = 0 if host_budget is None or host_budget == 0 else parse_bytes(host_budget, "host_budget")
    problem = dataclasses.replace(
        known,
        profile=profile,
        pins={} if pins is None else pins,
        host_bytes=host_bytes,
        max_distinct_runs=max_distinct_runs,
        time_limit_s=time_limit_s,
        seed=seed,
    )
    _check_host(problem, host_budget)
    room = budget_bytes - solved.always_bytes
    least = solved.solved.least_bytes
    fits = least is not None and room >= least
    if not fits and not host_bytes:
        raise solved.infeasible(budget_bytes, budget)
    if room < 0:
        raise InfeasibleError(
            f"`budget={budget!r}` is less than the {show_bytes(solved.always_bytes)} that every schedule "
            f"takes for {profile.fixed_parts}",
            budget_bytes=budget_bytes,
        )
    free = not pins and not host_bytes and max_distinct_runs is None
    problem = problem.within(max(1, solved.enough(room) if free else room))
    solution = integer_program.solve(problem, solved.solved)
    if solution.runs is None:
        raise _nothing_found(solved, solution, budget_bytes, budget, time_limit_s)
    if free:
        schedule = solved.schedule(solved.simplified(solution, room, regular), budget_bytes)
        return solved.packed(schedule, regular)
    schedule = solved.schedule(solution, budget_bytes, free=False)
    if host_bytes and fits and not pins and max_distinct_runs is None:
        return _faster(schedule, solved.at(budget_bytes, regular=regular))
    return schedule


def _faster(schedule: Schedule, alone: Schedule) -> Schedule:
    """The faster of a schedule with the host's memory and one without: the program knows nothing of the time
    that memory costs, and long chains are thinned without the host."""
    if alone.time_ns >= schedule.time_ns:
        return schedule
    status = alone.status if alone.time_ns <= schedule.bound_ns else Status.FEASIBLE
    return dataclasses.replace(alone, bound_ns=min(alone.time_ns, schedule.bound_ns), status=status)


def _check_host(problem: Problem, host_budget: int | str | None) -> None:
    """Raises `ArgumentError` where the host's memory is asked for and cannot be used, or is needed."""
    if problem.host_bytes and not any(layer.offload for layer in problem.profile.layers):
        raise ArgumentError(
            f"`host_budget={host_budget!r}`, but no layer of `profile` can send its residuals to the host: "
            "plan with `profile.offloading(bytes_per_s)`, the rate of the link"
        )
    for at, choice in {} if problem.host_bytes else dict(problem.pins).items():
        if as_strategies(choice, f"pins[{at}]") == {Strategy.OFFLOAD}:
            raise ArgumentError(
                f"`pins` sends layer {at} to the host, where nothing may be kept: give `host_budget`, and "
                "`profile.offloading(bytes_per_s)` for `profile`"
            )


def _nothing_found(
    solved: Frontier, solution: Solution, budget_bytes: int, budget: int | str, time_limit_s: float
) -> InfeasibleError:
    """The error where the integer program has no schedule."""
    if solution.status is Status.UNKNOWN:
        return InfeasibleError(
            f"no schedule found within `time_limit_s={time_limit_s}`, and none excluded: allow more time",
            budget_bytes=budget_bytes,
        )
    least = None if solution.least_bytes is None else solution.least_bytes + solved.always_bytes
    if least is not None:
        advice = f": the least-memory schedule under them needs {show_bytes(least)}"
    elif solved.least_bytes:
        advice = f"; without them {show_bytes(solved.least_bytes)} are enough"
    else:
        advice = ""
    return InfeasibleError(
        f"`budget={budget!r}` is infeasible with these side conditions{advice}",
        budget_bytes=budget_bytes,
        least_bytes=least,
    )
