"""From a profile and a budget to a schedule: solve, replay in the ledger, state what was proved.

The front door of the solvers. Imports `solvers`, `plans` and below.
"""

from mwplan.planning.budgets import Frontier, default_thin, frontier, frontier_for
from mwplan.planning.planner import plan
from mwplan.planning.schedules import (
    NARROWER,
    RECOMPUTATION,
    SolverMismatchError,
    baseline_schedules,
    scheduled,
)
from mwplan.solvers.problem import EVERY_STRATEGY
from mwplan.solvers.tuning import TUNING

__all__ = [
    "EVERY_STRATEGY",
    "NARROWER",
    "RECOMPUTATION",
    "TUNING",
    "Frontier",
    "SolverMismatchError",
    "baseline_schedules",
    "default_thin",
    "frontier",
    "frontier_for",
    "plan",
    "scheduled",
]
