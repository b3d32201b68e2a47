"""A solver's solution as a schedule, its costs from the ledger; and the plans that one would make by hand."""

from __future__ import annotations

import math

from mwplan.common.errors import MwplanError
from mwplan.plans.ledger import Replay, replay, strategies
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule, Solution, Strategy
from mwplan.solvers import baselines
from mwplan.solvers.problem import EVERY_STRATEGY, Problem

#: What all checkpointing does.
RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})
#: Sets of strategies whose plans are worth a look beside that of all: a profile's times are estimates,
#: recomputation alone may turn out faster, and other buffers lie closer or less so.
NARROWER = (
    EVERY_STRATEGY - {Strategy.VIJP, Strategy.FRAGMENT},
    EVERY_STRATEGY - {Strategy.INVERT},
    RECOMPUTATION,
)


class SolverMismatchError(MwplanError, AssertionError):
    """A solver claimed what the ledger does not confirm: a bug in mwplan, never the user's."""


def confirmed(profile: Profile, solution: Solution, max_error: float) -> Replay:
    """The ledger's replay of a solution. Raises `SolverMismatchError` unless it agrees with the solver."""
    checked = replay(profile, solution.runs or ())
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
    return checked


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
        peak_bytes=found.peak_bytes + profile.beside_bytes,
        stored_bytes=profile.stored_bytes,
        time_ns=found.time_ns + found.first_touch_ns,
        error=found.error,
        max_error=max_error,
        report_scales=found.report_scales,
        solver=solution.solver,
    )


def baseline_schedules(profile: Profile, *, max_error: float, allowed: frozenset[Strategy]) -> list[Schedule]:
    """What one would try by hand, of the allowed strategies: every layer stored, which is plain
    backpropagation; inversion wherever a layer allows it; moonwalk runs as long as the error allows."""
    problem = Problem(profile=profile, max_error=max_error)
    made = [baselines.store_all(problem), baselines.all_invert(problem), baselines.all_moonwalk(problem)]
    found = [scheduled(profile, solution, max_error) for solution in made if solution.runs is not None]
    return [one for one in found if allowed.issuperset(one.strategies)]
