"""Minimum cuts against trying every choice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from mwplan.solvers.minimum_cuts import Operation, Value, hull


def problem(seed: int) -> tuple[list[Value], list[Operation]]:
    """A random computation: operations of one or two results, in an order in which they can run."""
    rng = random.Random(seed)
    values = [
        Value(nbytes=rng.randint(1, 20), keep_ns=rng.choice([0, 1, 2])) for _ in range(rng.randint(1, 2))
    ]
    operations = []
    for at in range(rng.randint(1, 5)):
        reads = tuple(rng.sample(range(len(values)), min(len(values), rng.randint(1, 2))))
        once = rng.random() < 0.1
        operations.append(Operation(time_ns=rng.choice([0, 0, 3, 17]), reads=reads, once=once))
        for _ in range(rng.randint(1, 2)):
            size, ns, needed = rng.randint(1, 20), rng.choice([0, 1, 2]), rng.random() < 0.5
            values.append(Value(nbytes=size, keep_ns=ns, maker=at, needed=needed))
    return values, operations


def points(values: Sequence[Value], operations: Sequence[Operation]) -> list[tuple[float, float]]:
    """Bytes and time of every set of kept values from which all that is needed can be made."""
    found = []
    for flags in itertools.product((False, True), repeat=len(values)):
        again: set[int] = set()
        stack = [v for v, one in enumerate(values) if one.needed]
        possible = True
        while stack and possible:
            v = stack.pop()
            if flags[v]:
                continue
            maker = values[v].maker
            if maker is None or operations[maker].once:
                possible = False
            elif maker not in again:
                again.add(maker)
                stack += operations[maker].reads
        if possible:
            kept = [one for one, flag in zip(values, flags) if flag]
            time = sum(one.keep_ns for one in kept) + sum(operations[e].time_ns for e in again)
            found.append((float(sum(one.nbytes for one in kept)), float(time)))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_hulls_are_those_of_all_choices(seed: int) -> None:
    values, operations = problem(seed)
    every, cuts = points(values, operations), hull(values, operations)
    for cut in cuts:
        assert (cut.nbytes, pytest.approx(cut.time_ns)) in every
    for slope in (0.0, 0.05, 0.2, 0.7, 1.0, 2.0, 5.0, 20.0, 1e6):
        best = min(nbytes + slope * time for nbytes, time in every)
        assert min(cut.nbytes + slope * cut.time_ns for cut in cuts) == pytest.approx(best, rel=1e-5)
    corners = [(cut.nbytes, cut.time_ns) for cut in cuts]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(corners))


def test_a_computation_that_needs_nothing() -> None:
    """One cut, of nothing."""
    (cut,) = hull([Value(nbytes=4), Value(nbytes=4, maker=0)], [Operation(time_ns=1, reads=(0,))])
    assert (cut.kept, cut.operations, cut.nbytes, cut.time_ns) == ((), (), 0, 0.0)
