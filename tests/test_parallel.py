"""Solvers on several threads: the same points as on one."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from experiments.solver_chains import chain
from mwplan.solvers import parallel
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.problem import Problem
from mwplan.solvers.tuning import TUNING


def on(threads: int, patch: pytest.MonkeyPatch) -> None:
    """As if this process had so many processors."""
    patch.setattr(parallel, "processors", lambda: threads)
    patch.setattr("mwplan.solvers.candidates.processors", lambda: threads)


def test_results_are_in_order_and_the_first_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    on(3, monkeypatch)
    barrier = threading.Barrier(3, timeout=60)

    def square(x: int) -> int:
        barrier.wait()  # nobody goes on unless three are here at once
        return x * x

    assert parallel.each(square, range(6)) == [0, 1, 4, 9, 16, 25]
    with pytest.raises(ZeroDivisionError):
        parallel.each(lambda x: 1 // x, [1, 0, 2])
    assert parallel.each(square, []) == []


@pytest.mark.parametrize("thin", [0.0, 0.01])
def test_the_frontier_is_the_same_on_any_number_of_threads(
    thin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = chain(0, 40, submersive=True)
    found = []
    tuning = dataclasses.replace(TUNING, groups_most=100, groups_least=10)
    for threads in (1, 2, 5):
        on(threads, monkeypatch)
        frontier = solve_frontier(Problem(profile=profile, thin=thin, tuning=tuning))
        found.append((frontier.points, frontier.at(frontier.points[0][0]).runs))
    assert found[0] == found[1] == found[2]
