"""What solvers are given: arguments that cannot be used, and the edges of what can."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mwplan.solvers
from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Run, RunKind, Status, Strategy
from mwplan.solvers.brute_force import every_cost
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.integer_program import solve
from mwplan.solvers.problem import Problem
from tests.solver_checks import chain_of, pareto


@pytest.mark.parametrize(
    "change",
    [
        {"budget_bytes": 0},
        {"budget_bytes": -5},
        {"budget_bytes": 2**63},
        {"budget_bytes": 1.5},
        {"budget_bytes": True},
        {"time_limit_s": 0},
        {"time_limit_s": float("nan")},
        {"workers": 0},
        {"seed": -1},
        {"max_distinct_runs": 0},
        {"pins": {0: Strategy.STORE}},
        {"pins": {4: Strategy.STORE}},
        {"pins": {1: "stored"}},
        {"pins": {1: Strategy.STORE}, "forbid": {1: Strategy.STORE}},
        {"pins": {1: Strategy.VIJP}, "allowed": {Strategy.STORE}},
        {"max_error": -1.0},
        {"max_error": float("nan")},
        {"allowed": set()},
        {"allowed": {"stored"}},
        {"slack": -1.0},
        {"max_recompute_depth": -1},
    ],
)
def test_bad_arguments_are_named(change: dict[str, object]) -> None:
    arguments = {"budget_bytes": 100, **change}
    slack = arguments.pop("slack", 0.0)
    with pytest.raises(ArgumentError, match=r"`|layer"):
        solve(Problem(profile=chain_of(3), **arguments), slack=slack)  # type: ignore[arg-type]


def test_bad_frontier_arguments() -> None:
    for change in ({"thin": -0.1}, {"thin": 1.0}, {"max_error": "x"}, {"max_recompute_depth": 1.5}):
        with pytest.raises(ArgumentError, match="`"):
            solve_frontier(Problem(profile=chain_of(3), **change))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Profile"):
        solve_frontier(Problem(profile="profile"))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="frontier"):
        solve(Problem(profile=chain_of(3), budget_bytes=100), solve_frontier(Problem(profile=chain_of(2))))


def test_costs_at_the_edge_of_64_bits() -> None:
    with pytest.raises(ArgumentError, match="larger unit"):
        chain_of(3, residual_bytes=2**62, backward_workspace_bytes=2**62)
    with pytest.raises(ArgumentError, match="larger unit"):
        solve_frontier(Problem(profile=chain_of(3, residual_bytes=2**61)))
    profile = chain_of(3, residual_bytes=2**56, backward_ns=2**55)
    frontier = solve_frontier(Problem(profile=profile))
    assert frontier.points == pareto(every_cost(Problem(profile=profile)))
    solution = solve(Problem(profile=profile, budget_bytes=2**63 - 1), frontier)
    assert (solution.status, solution.time_ns) == (Status.OPTIMAL, frontier.points[-1][1])


def test_a_chain_of_one_layer() -> None:
    profile = chain_of(1)
    frontier = solve_frontier(Problem(profile=profile))
    assert frontier.points == ((16, 3),)
    solution = solve(Problem(profile=profile, budget_bytes=16))
    assert solution.runs == (Run(kind=RunKind.STORE, start=0, stop=1, options=("all",)),)
    pinned = Problem(profile=profile, budget_bytes=16, pins={1: Strategy.RECOMPUTE})
    assert solve(pinned).time_ns == 4


def test_solvers_load_no_ortools_and_import_no_jax() -> None:
    modules = "mwplan.solvers.frontier, mwplan.solvers.integer_program"
    code = f"import sys, {modules}; assert 'ortools' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in Path(mwplan.solvers.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from) jax", path.read_text(), re.MULTILINE), path
