"""What cannot be planned says so, and what to do."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from tests.chains import random_profile
from tests.helpers import mean_square, small_cnn
from tests.measured import measured


def test_host_memory_that_cannot_be_used_says_so() -> None:
    _, _, profile = measured()
    with pytest.raises(mw.ArgumentError, match=r"profile.offloading\(bytes_per_s\)"):
        mw.plan(profile, "1GiB", host_budget="1GiB")
    with pytest.raises(mw.ArgumentError, match="`bytes_per_s=0`"):
        profile.offloading(0)
    with pytest.raises(mw.ArgumentError, match="`host_budget='much'` is not a size"):
        mw.plan(profile.offloading(2e10), "1GiB", host_budget="much")
    offloading = profile.offloading(2e10, least_bytes=1)
    with pytest.raises(mw.InfeasibleError, match="side conditions; without them"):
        mw.plan(offloading, "1GiB", host_budget=1, pins={1: "offload"})
    with pytest.raises(mw.ArgumentError, match="sends layer 1 to the host"):
        mw.plan(offloading, "1GiB", pins={1: "offload"}, host_budget=0)
    with pytest.raises(mw.InfeasibleError, match="needs `host_budget`"):
        mw.plan(offloading, "1GiB", allowed="offload")
    with pytest.raises(mw.InfeasibleError, match="that every schedule takes") as caught:
        mw.plan(offloading, 1, host_budget="1GiB")
    assert caught.value.least_bytes is None


def test_a_frontier_or_pins_of_something_else() -> None:
    one, other = (random_profile(random.Random(seed), 3) for seed in (1, 2))
    with pytest.raises(mw.ArgumentError, match="`frontier` is of another profile"):
        mw.plan(one, "1GiB", frontier=mw.frontier(other))
    with pytest.raises(mw.ArgumentError, match="`pins=\\[1\\]`"):
        mw.plan(one, "1GiB", pins=[1])  # type: ignore[arg-type]
    profile = one.consuming_gradients(0)
    with pytest.raises(mw.ArgumentError, match="consumed already"):
        profile.consuming_gradients(8)


class TestErrors:
    def test_below_the_least_budget(self) -> None:
        _, _, profile = measured()
        with pytest.raises(
            mw.InfeasibleError, match=r"least-memory schedule needs [\d_]+ bytes.*sweep of layer"
        ) as caught:
            mw.plan(profile, "100 kB")
        least = caught.value.least_bytes
        assert least is not None
        plan = mw.plan(profile, least)
        assert plan.total_bytes == least
        with pytest.raises(mw.InfeasibleError):
            mw.plan(profile, least - 1)
        with pytest.raises(mw.InfeasibleError):
            mw.frontier(profile).at(least - 1)

    @pytest.mark.parametrize("budget", ["2 bananas", 0, -3, "-1GiB", 2**64])
    def test_what_is_no_budget(self, budget: Any) -> None:
        with pytest.raises(mw.ArgumentError, match="`budget="):
            mw.plan(random_profile(random.Random(0), 2), budget)

    def test_what_is_no_profile_tolerance_or_strategy(self) -> None:
        profile = random_profile(random.Random(0), 2)
        with pytest.raises(mw.ArgumentError, match="`profile`"):
            mw.plan(small_cnn(), "1GiB")  # type: ignore[arg-type]
        with pytest.raises(mw.ArgumentError, match="max_error"):
            mw.plan(profile, "1GiB", max_error=float("nan"))
        with pytest.raises(mw.ArgumentError, match="allowed"):
            mw.plan(profile, "1GiB", allowed=())
        with pytest.raises(mw.ArgumentError, match=r"`allowed` names 'stash'.*recompute"):
            mw.frontier(profile, allowed={"stash"})

    def test_loss_and_schedule_swapped(self) -> None:
        profile = random_profile(random.Random(0), 2)
        plan = mw.plan(profile, mw.frontier(profile).points[-1][0])
        with pytest.raises(mw.ArgumentError, match="`loss` is a Schedule, which") as caught:
            mw.value_and_grad(plan, mean_square)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200
        with pytest.raises(mw.ArgumentError, match="`schedule` is a Profile"):
            mw.value_and_grad(mean_square, profile)  # type: ignore[arg-type]

    def test_what_is_no_compiled_program(self) -> None:
        jitted = jax.jit(jnp.sin)
        for wrong in (jitted, jitted.lower(1.0)):
            with pytest.raises(mw.ArgumentError, match=r"lower\(...\).compile\(\)"):
                mw.temporaries(wrong)

    def test_profiles_want_arrays(self) -> None:
        chain = small_cnn()
        with pytest.raises(mw.ArgumentError, match="concrete"):
            mw.profile(chain, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
        with pytest.raises(mw.ArgumentError, match="repeats"):
            mw.profile(chain, jnp.ones((2, 8, 8, 1)), repeats=0)
