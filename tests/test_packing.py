"""Places for buffers, and the plans that are made with them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mwplan as mw
from mwplan.common import trees
from mwplan.compilers.compiling import workspace
from mwplan.plans.ledger import buffers
from mwplan.plans.packing import ALIGNMENT, Buffer, Packing, Workspace, pack
from tests.chains import random_profile


def alive_at_once(some: Sequence[Buffer]) -> int:
    """The most bytes alive at one moment."""
    return max((sum(b.size_bytes for b in some if b.start <= a.start <= b.stop) for a in some), default=0)


LIVES = st.builds(
    lambda size, start, life: Buffer(size, start, start + life),
    st.integers(1, 300),
    st.integers(0, 20),
    st.integers(0, 20),
)


@given(st.lists(LIVES, max_size=25))
def test_no_two_buffers_meet(some: list[Buffer]) -> None:
    packed = pack(some)
    ends = [at + one.size_bytes for at, one in zip(packed.offsets, some)]
    assert packed.total_bytes == max(ends, default=0) >= alive_at_once(some)
    assert all(at >= 0 and at % ALIGNMENT == 0 for at in packed.offsets)
    for (a, at, end), (b, other, its) in itertools.combinations(zip(some, packed.offsets, ends), 2):
        assert a.stop < b.start or b.stop < a.start or end <= other or its <= at


def test_a_gap() -> None:
    """A row of four, never more than two at once: the longest-lived and the first lie at 0, so the last but
    one meets it, and the one between both."""
    some = [Buffer(64, 5, 7), Buffer(64, 2, 4), Buffer(64, 7, 10), Buffer(64, 4, 6)]
    assert alive_at_once(some) == 128
    assert pack(some) == Packing(192, (64, 0, 0, 128))
    # Without the difference in lives, and with another size that fits beside.
    assert pack([Buffer(192, 0, 1), Buffer(64, 1, 5), Buffer(128, 3, 6)]) == Packing(256, (0, 192, 0))


def test_the_order_by_size_counts_the_life_of_the_first_array() -> None:
    """The longest-lived buffer comes last if its first array is short, into what gap there is."""
    some = [Buffer(64, 0, 9), Buffer(64, 4, 7), Buffer(64, 1, 2)]
    assert pack(some) == Packing(128, (0, 64, 64))
    assert pack(some, [1, 7, 2]) == Packing(128, (64, 0, 0))


@pytest.mark.parametrize("seed", range(10))
def test_the_ledgers_buffers_are_what_is_alive(seed: int) -> None:
    """At every point of a frontier; with workspaces in parts, never more."""
    rng = random.Random(seed)
    profile = without_savings(random_profile(rng, rng.randint(2, 6)))
    sizes = {v for layer in profile.layers for v in all_workspaces(layer) if v > 3}
    parts = tuple(
        Workspace(total_bytes=v, buffers=(Buffer(v // 2, 0, 0), Buffer(v // 3, 1, 2), Buffer(v // 2, 2, 2)))
        for v in sorted(sizes)
    )
    frontier = mw.frontier(profile)
    for total, _ in frontier.points:
        runs = frontier.at(total or 1).runs
        peak = mw.replay(profile, runs).peak_bytes
        assert alive_at_once(buffers(profile, runs)) == peak
        assert alive_at_once(buffers(dataclasses.replace(profile, workspaces=parts), runs)) <= peak


def without_savings(profile: mw.Profile) -> mw.Profile:
    def plain(option: object) -> object:
        names = [f.name for f in dataclasses.fields(option) if f.name.endswith("saving_bytes")]  # type: ignore[arg-type]
        return dataclasses.replace(option, **dict.fromkeys(names, 0))  # type: ignore[type-var]

    kinds = ("store", "moonwalk", "invert")
    return dataclasses.replace(
        profile,
        layers=tuple(
            dataclasses.replace(one, **{kind: tuple(map(plain, getattr(one, kind))) for kind in kinds})
            for one in profile.layers
        ),
    )


def all_workspaces(layer: object) -> list[int]:
    options = [o for kind in ("store", "moonwalk", "invert") for o in getattr(layer, kind)]
    return [
        getattr(one, f.name)
        for one in (layer, *options)
        for f in dataclasses.fields(one)  # type: ignore[arg-type]
        if f.name.endswith("workspace_bytes")
    ]


def test_what_a_compiled_program_tells_of_its_workspace() -> None:
    """Two arrays of different sizes, one after the other's cause: both are temporaries."""

    def program(x: jax.Array) -> jax.Array:
        first = trees.tie(jnp.concatenate([x, x]) * 2)
        second = trees.tie(jnp.concatenate([first, x]) + 1)
        return jnp.sum(second[::3]) + jnp.sum(first)

    compiled = mw.jit(program).lower(jnp.ones(5000)).compile()
    found = workspace(compiled, 1024)
    assert found.total_bytes == mw.temporaries(compiled)
    assert {40_000, 60_000} <= {b.size_bytes for b in found.buffers}
    assert alive_at_once(found.buffers) <= found.total_bytes


def test_plans_keep_the_budget_with_fragmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fragmentation is predicted to take half as much again, the plan is the one for two thirds of the
    room; where nothing helps, it stays."""
    profile = random_profile(random.Random(4), 5)
    profile = dataclasses.replace(
        profile, workspaces=(Workspace(total_bytes=1, buffers=(Buffer(1, 0, 0),)),), fixed_bytes=0
    )
    plain = mw.frontier(dataclasses.replace(profile, workspaces=()))
    monkeypatch.setattr(
        "mwplan.planning.budgets.pack", lambda some: Packing(alive_at_once(some) * 3 // 2, ())
    )
    holed = mw.frontier(profile)
    budget = plain.points[-1][0]
    for got in (holed.at(budget), mw.plan(profile, budget)):
        assert got.peak_bytes < plain.at(budget).peak_bytes
        assert got.peak_bytes <= got.packed_bytes <= budget
        assert got.bound_ns <= got.time_ns
        assert got.status is mw.Status.FEASIBLE
    least = holed.least_bytes
    assert least is not None
    assert holed.at(least).runs == plain.at(least).runs
    assert holed.at(least).packed_bytes > least
