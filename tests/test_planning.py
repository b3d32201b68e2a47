"""From a chain to a plan: measurement, planning, trace, and the errors on the way."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan import layers
from mwplan.common.sizes import parse_bytes
from mwplan.layers import Conv2D, Dense, LeakyReLU, MaxMin, layer
from mwplan.network import operations, residuals, rules
from mwplan.plans.schedule import Run, RunKind
from mwplan.profiling import touch
from mwplan.solvers.brute_force import every_cost
from tests.chains import random_profile
from tests.helpers import mean_square, relative_error, small_cnn, tanh, with_round_times


def conv_chain() -> mw.Chain:
    """Activations of 1 MiB, every way of handling a layer in it."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    made: list[Any] = [Conv2D.init(next(keys), 8, 16, 1), LeakyReLU(0.6)]
    for _ in range(3):
        made += [Conv2D.init(next(keys), 16, 16, 1), MaxMin()]
    made += [Conv2D.init(next(keys), 16, 16, 3), tanh, Dense.init(next(keys), 16, 4)]
    return mw.Chain(made)


@functools.cache
def measured() -> tuple[mw.Chain, Any, mw.Profile]:
    chain = conv_chain()
    x = jax.random.normal(jax.random.key(1), (64, 16, 16, 8))
    return chain, x, with_round_times(mw.profile(chain, x, repeats=1))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_measured_memory_is_the_predicted(fraction: float) -> None:
    chain, x, profile = measured()
    points = mw.frontier(profile).points
    budget = points[0][0] + int(fraction * (points[-1][0] - points[0][0]))
    plan = mw.plan(profile, budget)
    step = mw.jit(mw.value_and_grad(mean_square, plan)).lower(chain, x).compile()
    got = mw.temporaries(step)
    assert abs(got - plan.peak_bytes) < 0.1 * plan.peak_bytes
    assert got + plan.fixed_bytes <= budget * 1.02
    (_, report), grads = step(chain, x)
    want = jax.grad(lambda c: mean_square(c(x)))(chain)
    assert relative_error(grads, want) < 1e-4
    assert float(report.worst) < 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_live_arrays_are_the_ledgers_at_every_event(fraction: float) -> None:
    chain, x, profile = measured()
    points = mw.frontier(profile).points
    plan = mw.frontier(profile).at(points[int(fraction * (len(points) - 1))][0])
    timeline = mw.trace(plan, chain, x, mean_square, profile=profile)
    assert len(timeline.events) == len(mw.replay(profile, plan.runs).events)
    assert [e.array_bytes for e in timeline.events] == [e.predicted_array_bytes for e in timeline.events]
    want = jax.grad(lambda c: mean_square(c(x)))(chain)
    assert relative_error(timeline.gradients, want) < 1e-4
    timeline.plot()


def test_residuals_in_the_host_s_memory() -> None:
    """A CPU has no memory beside the host's, so that what is planned shows in the trace alone: device bytes
    as the ledger has them, the rest away."""
    chain, x, profile = measured()
    profile = profile.offloading(2e10, least_bytes=1 << 10)
    frontier = mw.frontier(profile)
    assert frontier.least_bytes is not None
    away = 0
    for host in ("64 KiB", "1GiB"):
        plan = mw.plan(profile, frontier.least_bytes, host_budget=host)
        assert plan.time_ns <= frontier.at(frontier.least_bytes).time_ns
        assert plan.host_bytes <= parse_bytes(host)
        assert mw.Schedule.from_json(plan.to_json()) == plan
        away += plan.strategies.count(mw.Strategy.OFFLOAD)
        assert ("host memory" in str(plan)) == (plan.host_bytes > 0)
        timeline = mw.trace(plan, chain, x, mean_square, profile=profile)
        assert [e.array_bytes for e in timeline.events] == [e.predicted_array_bytes for e in timeline.events]
        want = jax.grad(lambda c: mean_square(c(x)))(chain)
        step = mw.jit(mw.value_and_grad(mean_square, plan))
        for got in (step(chain, x)[1], timeline.gradients):
            assert relative_error(got, want) < 1e-4
    assert away
    assert mw.Profile.from_json(profile.to_json()) == profile
    alone = mw.plan(profile, frontier.least_bytes, host_budget="1GiB", pins={1: "offload"})
    assert alone.strategies[0] is mw.Strategy.OFFLOAD


def test_host_memory_that_cannot_be_used_says_so() -> None:
    _, _, profile = measured()
    with pytest.raises(mw.ArgumentError, match=r"profile.offloading\(bytes_per_s\)"):
        mw.plan(profile, "1GiB", host_budget="1GiB")
    with pytest.raises(mw.ArgumentError, match="`bytes_per_s=0`"):
        profile.offloading(0)
    with pytest.raises(mw.ArgumentError, match="`host_budget='much'` is not a size"):
        mw.plan(profile.offloading(2e10), "1GiB", host_budget="much")
    away = profile.offloading(2e10, least_bytes=1)
    with pytest.raises(mw.InfeasibleError, match="side conditions; without them"):
        mw.plan(away, "1GiB", host_budget=1, pins={1: "offload"})
    with pytest.raises(mw.ArgumentError, match="sends layer 1 to the host"):
        mw.plan(away, "1GiB", pins={1: "offload"}, host_budget=0)
    with pytest.raises(mw.InfeasibleError, match="needs `host_budget`"):
        mw.plan(away, "1GiB", allowed="offload")
    with pytest.raises(mw.InfeasibleError, match="that every schedule takes") as caught:
        mw.plan(away, 1, host_budget="1GiB")
    assert caught.value.least_bytes is None


def test_memory_on_the_host_never_makes_a_plan_slower() -> None:
    """Where memory costs time too, which the integer program does not know."""
    for seed in range(12):
        profile = random_profile(random.Random(seed), 3, moonwalks=0, inverts=0, scale=1000)
        profile = dataclasses.replace(profile.offloading(1e9, least_bytes=1), fresh_mib_ns=200_000)
        least = mw.frontier(profile).least_bytes
        assert least is not None
        without, with_ = mw.plan(profile, 3 * least), mw.plan(profile, 3 * least, host_budget="1GiB")
        assert with_.bound_ns <= with_.time_ns <= without.time_ns


def test_what_layers_close_over_is_let_go() -> None:
    """A profile and a compiled step remember no functions, nor the arrays in them."""
    x, gone = jnp.ones((2, 64)), []
    for _ in range(2):
        big = jnp.ones((64, 64))
        gone.append(weakref.ref(big))
        chain = mw.Chain([lambda x, big=big: x @ big, jnp.tanh])
        plan = mw.plan(mw.profile(chain, x, repeats=1), "1GiB")
        mw.jit(mw.value_and_grad(mean_square, plan))(chain, x)
        del big, chain
    jax.clear_caches()
    gc.collect()
    assert not any(one() is not None for one in gone)


@layer
class Picked:
    """With integers, and weights, of NumPy's 64 bits."""

    index: Any
    weight: Any

    def __call__(self, x: Any) -> Any:
        return x[:, self.index] * self.weight


def test_arrays_that_jit_makes_narrower_or_cannot_keep() -> None:
    x = jnp.ones((8, 4))
    chain = mw.Chain([Picked(np.arange(4), np.ones(4)), jnp.tanh])
    assert mw.fit(mean_square, chain, x, budget="1MiB").temporary_bytes
    # JAX cannot keep complex products for `jax.checkpoint`.
    weight = jnp.ones((4, 4), jnp.complex64)
    chain = mw.Chain([lambda x: jnp.sin(x @ weight), jnp.abs])
    plan = mw.plan(mw.profile(chain, x, repeats=1), "1MiB")
    assert mw.jit(mw.value_and_grad(mean_square, plan))(chain, x)[0][0] > 0
    # Nothing at all fits nothing.
    nothing = mw.profile(mw.Chain([jnp.tanh, jnp.tanh]), jnp.ones((0, 4)), repeats=1)
    least = mw.frontier(nothing).least_bytes
    assert least is not None
    assert mw.plan(nothing, least).peak_bytes <= least


def test_a_frontier_or_pins_of_something_else() -> None:
    one, other = (random_profile(random.Random(seed), 3) for seed in (1, 2))
    with pytest.raises(mw.ArgumentError, match="`frontier` is of another profile"):
        mw.plan(one, "1GiB", frontier=mw.frontier(other))
    with pytest.raises(mw.ArgumentError, match="`pins=\\[1\\]`"):
        mw.plan(one, "1GiB", pins=[1])  # type: ignore[arg-type]
    profile = one.consuming_gradients(0)
    with pytest.raises(mw.ArgumentError, match="consumed already"):
        profile.consuming_gradients(8)


def test_moonwalk_only_plans_run_and_fit() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 4))
    made: list[Any] = [Conv2D.init(next(keys), 16, 16, 1), LeakyReLU(0.6)]
    for _ in range(3):
        made += [Conv2D.init(next(keys), 16, 16, 1), MaxMin()]
    chain, x = mw.Chain(made), jax.random.normal(jax.random.key(1), (64, 16, 16, 16))
    profile = mw.profile(chain, x, repeats=1)
    allowed = {mw.Strategy.STORE, mw.Strategy.VIJP, mw.Strategy.FRAGMENT}
    frontier = mw.frontier(profile, allowed=allowed)
    plan = frontier.at(frontier.points[0][0])
    assert mw.Strategy.VIJP in plan.strategies
    step = mw.jit(mw.value_and_grad(mean_square, plan)).lower(chain, x).compile()
    assert mw.temporaries(step) <= 1.02 * plan.peak_bytes
    (_, report), grads = step(chain, x)
    assert relative_error(grads, jax.grad(lambda c: mean_square(c(x)))(chain)) < 1e-4
    assert 0 < float(report.worst) < 1e-4


def test_profiles_are_measured_once_for_equal_layers() -> None:
    _, _, profile = measured()
    assert profile.layers[2].store == profile.layers[4].store
    assert profile.layers[2].moonwalk == profile.layers[4].moonwalk
    assert mw.Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("activation", [layers.ReLU(), LeakyReLU(0.5)])
def test_an_output_that_is_kept_anyway_costs_nothing(activation: Any) -> None:
    """A dense layer keeps its input, which tells the signs of the activation before it: no bits, in a
    composite neither."""
    dense = Dense.init(jax.random.key(0), 64, 64)
    chain = mw.Chain([dense, activation, dense, activation, dense])
    x = jax.random.normal(jax.random.key(1), (4096, 64))

    def kept(layer: Any) -> dict[str, tuple[int, bool]]:
        found = {}
        for rule in operations.store_rules(layer, x):
            held = jax.eval_shape(functools.partial(operations.forward, rule=rule), layer, x)[1]
            found[rule.name] = residuals.new_bytes(held), held.keeps_output
        return found

    own = kept(activation)
    assert own.pop("vjp") == own["bits"]
    assert own == {"bits": (x.size // 8, False), "output": (0, True)}
    block = kept(layers.Sequential((dense, activation, dense)))
    assert block["parts"][0] == x.nbytes + x.size // 8
    assert block["parts.output"][0] == x.nbytes

    def loss(y: Any) -> Any:
        """Its gradient needs no memory of its own."""
        return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, 64))

    def temporaries(option: str) -> int:
        runs = tuple(
            Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(option if at % 2 else "vjp",))
            for at in range(5)
        )
        step = mw.jit(mw.value_and_grad(loss, mw.Schedule(runs=runs))).lower(chain, x).compile()
        plain = jax.grad(lambda chain: loss(chain(x)))(chain)
        assert relative_error(step(chain, x)[1], plain) < 1e-5
        return mw.temporaries(step)

    assert (
        4 * x.nbytes <= temporaries("output") <= 4.01 * x.nbytes
    )  # both outputs, that of the chain and its cotangent
    assert temporaries("bits") >= temporaries("output") + x.size // 8


def test_of_what_keeps_the_same_the_lesser_is_left_out() -> None:
    """A norm's own rule and `jax.vjp` both keep its input, and its own needs less workspace."""
    (norm,) = mw.profile(mw.Chain([layers.RMSNorm.init(None, 16)]), jnp.ones((512, 16)), repeats=1).layers
    assert [option.name for option in norm.store] == ["input"]


def test_a_composite_is_inverted_at_its_parts_cost() -> None:
    """Of a rule that keeps nothing, too, a composite's backward is of all its parts."""
    one = layers.Coupling(layers.Smooth("gelu"), Dense.init(jax.random.key(0), 4, 4))
    x = jax.random.normal(jax.random.key(1), (2048, 8))

    def option(layer: Any) -> InvertOption:
        (found,) = mw.profile(mw.Chain([layer]), x, repeats=1).layers[0].invert
        return found

    alone, inside = option(one), option(layers.Sequential((one,)))
    assert alone.backward_workspace_bytes > x.nbytes // 2  # a branch's output at the very least
    assert abs(inside.backward_workspace_bytes - alone.backward_workspace_bytes) <= 256
    assert inside.residual_bytes == alone.residual_bytes == 0


def test_input_residuals_alone_are_counted() -> None:
    _, _, profile = measured()
    maxmin = profile.layers[3]
    undo = next(o for o in maxmin.moonwalk if o.name == "undo")
    assert undo.residual_bytes == profile.activation_bytes[4] // 4 // 16  # a bit a pair
    linear = profile.layers[2].moonwalk[0]
    assert (linear.residual_bytes, linear.keeps_input, linear.keeps_output) == (0, False, False)
    _, held = operations.forward(jnp.exp, jnp.ones(3), rule=rules.VjpStore())
    assert held.keeps_output  # as `jax.vjp` of exp does
    assert residuals.new_bytes(held) == 0


@layer
class Own:
    """A layer that flattens its input, and whose gain has one axis."""

    scale: Any
    weight: Any

    def __call__(self, x: Any) -> Any:
        return jnp.sin(x.reshape(-1, 8) @ self.weight).reshape(4, 6, 3)[:, None] * self.scale


def clipped(x: Any) -> Any:
    return jnp.where(x > 0, jnp.minimum(x, 1.0), 0)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, lambda x: jnp.where(x > 0, x, 0), clipped])
def test_numbers_that_fill_an_array_are_not_kept(activation: Any) -> None:
    """`jax.vjp` of these keeps masks, and zeros as large as the activation."""
    x = jnp.linspace(-2.0, 2.0, 64).reshape(8, 8)
    rule = rules.VjpStore()
    y, held = operations.forward(activation, x, rule=rule)
    zeros = [one for one in held.spec.sources if one[0] == "all"]
    assert zeros
    assert {one[1] for one in zeros} == {0.0}
    if activation is not clipped:  # a mask of 64 bits
        assert residuals.new_bytes(held) == 8
    _, ct = operations.store_backward(activation, held, x, y, 2 * jnp.ones_like(y), rule=rule)
    assert jnp.array_equal(ct, 2 * jax.grad(lambda x: jnp.sum(activation(x)))(x))


def test_numbers_told_from_arrays() -> None:
    """Only what is one number whatever the arguments: not an argument that happens to be filled with one, nor
    a product of constants."""
    zeros = jnp.zeros((4, 4))

    def make(scale: float, x: Any) -> Any:
        filled = jnp.full((3,), 2, jnp.int32).astype(jnp.float32)
        return [
            x,
            filled,
            x * scale,
            jnp.full((2,), scale),
            jax.jit(lambda a: a)(jnp.ones((2, 2))),
            jnp.arange(3),
        ]

    same, *others = residuals.origins(make, 0.5, zeros)
    assert same.leaf is zeros
    assert others == [2.0, None, 0.5, 1.0, None]
    assert residuals.origins(make, 1, zeros)[3] == 1
    assert residuals.origins(make, bytearray(b"0"), zeros) == ()  # neither an array nor hashable


def test_an_input_in_another_shape_is_not_kept_anew() -> None:
    """As dense layers of more than two axes have it, and the gain of a normalisation."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))

    made = (
        Dense.init(jax.random.key(2), 8, 8),
        layers.Sequential((layers.Flatten(2), Dense.init(jax.random.key(3), 48, 5))),
        Own(jnp.arange(3.0), jax.random.normal(jax.random.key(1), (8, 3))),
    )
    for one in made:
        rule = rules.VjpStore()
        y, pull = jax.vjp(lambda layer, x: layer(x), one, x)
        got, held = operations.forward(one, x, rule=rule)
        assert jnp.array_equal(got, y)
        assert held.keeps_input
        assert not any(leaf.size in (x.size, 3) for leaf in held.own)
        grads, ct = operations.store_backward(one, held, x, None, jnp.ones_like(y), rule=rule)
        want, want_ct = pull(jnp.ones_like(y))
        assert jnp.allclose(ct, want_ct, rtol=1e-5)
        assert all(map(jnp.allclose, grads, jax.tree.leaves(want)))
    # Neither a transposed input nor one of other numbers is the input in another shape.
    turned = residuals.origins(
        lambda x: [x.T, jnp.reshape(x, (2, -1)) + 0, jax.lax.reshape(x, (192,), (2, 1, 0))], x
    )
    assert turned == (None, None, None)


@pytest.mark.parametrize("seed", range(15))
def test_plans_are_optimal(seed: int) -> None:
    """At every budget where brute force over the same space finds a new best, on chains of up to 5 layers."""
    rng = random.Random(seed)
    profile = random_profile(rng, rng.randint(1, 5))
    best = None
    for need, time in sorted(every_cost(profile).items()):
        if best is not None and time >= best:
            continue
        best = time
        plan = mw.plan(profile, need or 1)
        assert (plan.time_ns, plan.status) == (time, mw.Status.OPTIMAL)
        assert plan.bound_ns == time
        assert plan.peak_bytes <= need


@pytest.mark.parametrize("seed", range(8))
def test_memory_that_costs_time(seed: int) -> None:
    """The least sum of both at every budget, by brute force; leaner than the budget where that is faster."""
    rng = random.Random(seed)
    plain = random_profile(rng, rng.randint(2, 5))
    costs = every_cost(plain)
    kept, rate = (
        sorted(costs)[len(costs) // 3],
        2**20 * max(costs.values()) // max(costs) // rng.randint(1, 4),
    )
    profile = dataclasses.replace(plain, kept_bytes=kept, fresh_mib_ns=rate)
    frontier = mw.frontier(profile)
    for budget in sorted(costs)[:: 1 + len(costs) // 8]:
        want = min(time + profile.fresh_ns(need) for need, time in costs.items() if need <= budget)
        for plan in (mw.plan(profile, budget or 1, frontier=frontier), frontier.at(budget or 1)):
            assert (plan.time_ns, plan.bound_ns, plan.status) == (want, want, mw.Status.OPTIMAL)
    assert mw.Profile.from_json(profile.to_json()) == profile
    times = [time for _, time in frontier.points]
    assert times == sorted(times, reverse=True)
    pinned = mw.plan(profile, max(costs), pins={1: mw.Strategy.STORE})
    assert pinned.bound_ns <= pinned.time_ns


def test_the_first_touch_of_memory_is_measured() -> None:
    found = touch.measured()
    assert 0 <= found.kept_bytes <= 2**25
    assert 0 <= found.first_touch_mib_ns < 5e6  # 5 ms a MiB: a page in 20 microseconds


class TestErrors:
    def test_below_the_least_budget(self) -> None:
        _, _, profile = measured()
        with pytest.raises(
            mw.InfeasibleError, match=r"leanest schedule needs [\d_]+ bytes.*sweep of layer"
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


@layer
class Carrying:
    """A product, a sine, and dropout by a mask or a key, which are carried along, as is what is neither."""

    weight: jax.Array

    def __call__(self, a: Any) -> Any:
        x, other = a
        if other.dtype == bool:
            x = jnp.where(other, x, 0)
        elif jax.dtypes.issubdtype(other.dtype, jax.dtypes.prng_key):
            other, key = jax.random.split(other)
            x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0)
        return jnp.sin(x @ self.weight), other


@pytest.mark.parametrize(
    ("kind", "stacked"), [("typed key", False), ("typed key", True), ("key", False), ("mask", False)]
)
def test_activations_that_carry_what_has_no_gradient(kind: str, stacked: bool) -> None:
    x = jax.random.normal(jax.random.key(1), (64, 64))
    # This generator compiles fast.
    key = jax.random.key(0, impl="unsafe_rbg")
    carried = {"typed key": key, "key": jax.random.key_data(key), "mask": x > -1}[kind]
    dense = [Carrying(jax.random.normal(key, (64, 64)) / 8) for key in jax.random.split(jax.random.key(2), 3)]
    chain = mw.Chain([*dense, lambda a: a[0]])
    chain = mw.stack(chain, (x, carried)) if stacked else chain
    want = jax.grad(lambda c: mean_square(c((x, carried))))(chain)
    profile = mw.profile(chain, (x, carried), repeats=1)
    assert mw.estimate(chain, (x, carried), device="h100").activation_bytes == profile.activation_bytes
    for allowed in ({mw.Strategy.STORE}, {mw.Strategy.STORE, mw.Strategy.RECOMPUTE}):
        least = mw.frontier(profile, allowed=allowed).least_bytes
        assert least is not None
        plan = mw.plan(profile, least, allowed=allowed)
        assert set(plan.strategies) == allowed
        step = mw.jit(mw.value_and_grad(mean_square, plan))
        (_, _), grads = step(chain, (x, carried))
        assert relative_error(grads, want) < 1e-5
    if not stacked:
        assert relative_error(mw.trace(plan, chain, (x, carried), mean_square).gradients, want) < 1e-5


def test_strategies_go_by_name_too() -> None:
    profile = random_profile(random.Random(3), 4)
    named = mw.frontier(profile, allowed=["store", "Recompute"])
    by_hand = mw.frontier(profile, allowed={mw.Strategy.STORE, mw.Strategy.RECOMPUTE})
    assert named.points == by_hand.points
    budget = named.points[-1][0]
    assert set(mw.plan(profile, budget, allowed="STORE").strategies) == {mw.Strategy.STORE}
    pinned = mw.plan(profile, budget, allowed=("store", "RECOMPUTE"), pins={1: "store", 2: ["Store"]})
    assert pinned.strategies[:2] == (mw.Strategy.STORE,) * 2


def test_a_profile_reads_well() -> None:
    _, _, profile = measured()
    text = str(profile)
    assert text.count("\n") < 6
    for word in (f"profile of {len(profile)} layers", profile.device, "fixed", "outputs", "mw.plan"):
        assert word in text


def test_frontier_table_and_plot(tmp_path: Path) -> None:
    profile = random_profile(random.Random(3), 4)
    frontier = mw.frontier(profile)
    table = frontier.table()
    assert len(table) == len(frontier.points)
    assert (table["time_ns"].diff().dropna() < 0).all()
    assert frontier.plot().get_xlabel()
    assert f"{len(table)} schedules" in str(frontier)


def test_a_schedule_reads_well() -> None:
    _, _, profile = measured()
    frontier = mw.frontier(profile)
    text = str(mw.plan(profile, frontier.points[len(frontier.points) // 2][0]))
    for word in ("predicted peak", "optimal", "least budget", "binding", "more memory"):
        assert word in text
