"""Pareto sets of integer points."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mwplan.solvers.pareto import lexicographic, nondominated


@pytest.mark.parametrize(
    ("size", "most", "columns", "among"),
    [
        (1, 9, 3, 3),
        (64, 4, 3, 3),
        (65, 10**6, 3, 3),
        (700, 30, 3, 3),
        (700, 2**40, 3, 3),
        (1, 9, 5, 3),
        (300, 3, 5, 100),
        (300, 2**40, 4, 100),
        (400, 30, 6, 2),
    ],
)
def test_nondominated_points_are_those_that_nothing_beats(
    size: int, most: int, columns: int, among: int
) -> None:
    rng = random.Random(size)
    points = [tuple(rng.randint(0, most) for _ in range(columns)) for _ in range(size)]
    # Points of one sum beat none but their equals.
    points += [(*rest, a, b, 2 * most - a - b) for *rest, a, b, _ in points]
    groups = [rng.randint(0, among - 1) for _ in points]
    kept = nondominated([np.array(x) for x in zip(*points)], np.array(groups)).tolist()
    assert [groups[k] for k in kept] == sorted(groups[k] for k in kept)

    def beaten(point: tuple[int, ...], group: int, others: list[int]) -> bool:
        return any(groups[k] == group and all(a <= b for a, b in zip(points[k], point)) for k in others)

    for k, (point, group) in enumerate(zip(points, groups)):
        assert beaten(point, group, [x for x in kept if x != k]) == (k not in kept)


@pytest.mark.parametrize("highs", [(3, 4, 5), (3, 2**40, 4, 3), (2**60, 2, 3), (2, 3, 2**61)])
def test_the_order_is_lexicographic(highs: tuple[int, ...]) -> None:
    """Whether all columns fit one integer or not; equal rows stay in order."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, min(high, 4), 400) * (high // min(high, 4)) for high in highs]
    assert (lexicographic(columns) == np.lexsort(columns[::-1])).all()
    assert lexicographic([x[:0] for x in columns]).size == 0
