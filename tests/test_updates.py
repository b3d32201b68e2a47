"""Gradients consumed as they come: the same training step in less memory."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan as mw
from mwplan.layers import Dense, MaxMin
from mwplan.network import rules
from mwplan.network.chain import boundaries
from mwplan.plans.schedule import Run, RunKind, Schedule
from tests.helpers import mean_square, mlp, random_runs, relative_error, segments, small_cnn, store_all
from tests.test_stack import repeated, stacked, wide


def plain_step(optimizer: Any, chain: mw.Chain, state: Any, x: Any) -> tuple[mw.Chain, Any]:
    """Backpropagation and `optax` on the whole chain."""
    grads = jax.grad(lambda c: mean_square(c(x)))(chain)
    steps, state = optimizer.update(grads, state, chain)
    return optax.apply_updates(chain, steps), state


def check(optimizer: Any, chain: mw.Chain, x: Any, runs: tuple[Run, ...], tolerance: float) -> None:
    """Three steps are those of backpropagation and the optimizer after it."""
    step = mw.jit(mw.value_and_update(mean_square, Schedule(runs=runs), optimizer))
    states = mw.init_states(optimizer, chain)
    want, state = chain, optimizer.init(chain)
    plain = mw.jit(lambda c, s, x: plain_step(optimizer, c, s, x))
    for _ in range(3):
        (value, report), chain, states = step(chain, states, x)
        assert relative_error(value, mean_square(want(x))) < 10 * tolerance
        want, state = plain(want, state, x)
        assert not float(report.worst) > 1e-3
    assert relative_error(chain, want) < tolerance, runs


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6))
def test_any_schedule_takes_the_plain_step(seed: int) -> None:
    rng = random.Random(seed)
    with jax.enable_x64(True):
        chain, x = wide((small_cnn(seed % 5), jax.random.normal(jax.random.key(seed), (3, 8, 8, 1))))
        check(optax.sgd(0.1, momentum=0.9), chain, x, random_runs(rng, chain, x), 1e-9)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6))
def test_stacks_take_the_plain_step(seed: int) -> None:
    rng = random.Random(seed)
    with jax.enable_x64(True):
        chain, x = wide(stacked())
        check(optax.adamw(1e-2), chain, x, repeated(rng, chain, x), 1e-8)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
        optax.chain(optax.clip(0.01), optax.lion(1e-3)),
        optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.lamb(1e-2),
    ],
    ids=["schedule", "clipped", "mask", "lamb"],
)
def test_optimizers(optimizer: Any) -> None:
    chain, x = mlp(3), jax.random.normal(jax.random.key(0), (4, 8))
    check(optimizer, chain, x, (*segments(chain, 2)[:2], *store_all(chain)[4:]), 1e-4)


def test_bfloat16_weights_aux_and_integer_leaves() -> None:
    @mw.layers.layer
    class Shift:
        weight: Any
        by: Any

        def __call__(self, x: Any) -> Any:
            return jnp.roll(x, self.by, axis=-1) * self.weight

    chain = mw.Chain([*mlp(1), Shift(jnp.ones(8, jnp.bfloat16), jnp.int32(2)), jax.nn.relu])
    x = jax.random.normal(jax.random.key(0), (4, 8))
    optimizer = optax.adam(1e-2)
    step = mw.value_and_update(
        lambda y, t: (mean_square(y, t), y.sum()), Schedule(runs=store_all(chain)), optimizer, has_aux=True
    )
    ((_, total), _), new, states = mw.jit(step)(chain, mw.init_states(optimizer, chain), x, jnp.ones((4, 8)))
    assert total.shape == ()
    assert new[2].weight.dtype == jnp.bfloat16
    assert int(new[2].by) == 2
    assert jax.tree.structure(new) == jax.tree.structure(chain)
    assert jax.tree.structure(states) == jax.tree.structure(mw.init_states(optimizer, chain))


def whole_bytes(compiled: Any) -> int:
    """Arguments, outputs that are not in their place, and temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def wide_network(kind: str, depth: int) -> tuple[mw.Chain, Any, Schedule]:
    """Layers of 1 MiB of weights, of kilobytes of activations, by one kind of run."""
    keys = jax.random.split(jax.random.key(0), depth)
    chain, x = mw.Chain([f for k in keys for f in (Dense.init(k, 512, 512), MaxMin())]), jnp.ones((8, 512))
    if kind == "walked":
        names = tuple(
            next(r.name for r in rules.vijp_rules(one, s) if not isinstance(r, rules.Unavailable))
            for one, s in zip(chain, boundaries(chain, x))
        )
        runs: tuple[Run, ...] = (Run(kind=RunKind.MOONWALK, start=0, stop=2 * depth, options=names),)
    else:
        runs = store_all(chain) if kind == "stored" else segments(chain, 8)
    return chain, x, Schedule(runs=runs)


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("kind", ["stored", "recomputed", "walked"])
def test_gradients_never_live_together(kind: str, stacks: bool) -> None:
    """The compiled step needs about the gradients' bytes less than `value_and_grad` and the optimizer after
    it.

    Of layers that are not stacked XLA:CPU sees to that by itself if both are one program; so there the
    gradient step alone is the measure, as where gradients are summed or sent before the update.
    """
    chain, x, schedule = wide_network(kind, 24 if stacks else 8)
    chain = mw.stack(chain, x) if stacks else chain
    optimizer = optax.adam(1e-3)

    def after(chain: mw.Chain, state: Any, x: Any) -> Any:
        value, grads = mw.value_and_grad(mean_square, schedule)(chain, x)
        steps, state = optimizer.update(grads, state, chain)
        return value, optax.apply_updates(chain, steps), state

    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(chain))
    states = mw.init_states(optimizer, chain)
    early = mw.jit(mw.value_and_update(mean_square, schedule, optimizer), donate_argnums=(0, 1))
    early = early.lower(chain, states, x).compile()
    if stacks:
        late = mw.jit(after, donate_argnums=(0, 1)).lower(chain, optimizer.init(chain), x).compile()
        needs = whole_bytes(late)
    else:
        late = mw.jit(mw.value_and_grad(mean_square, schedule)).lower(chain, x).compile()
        needs = whole_bytes(late) + sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    assert needs - whole_bytes(early) > 0.8 * gradients
    assert whole_bytes(early) < 3.3 * gradients  # weights, two moments, and little else


def test_the_planner_knows() -> None:
    """A profile without gradients: its plan is for less, and the compiled step needs no more.

    At the least budget (3.5 activations) XLA:CPU keeps one activation more in the recomputed layers, with
    `value_and_grad` as well, and places the gradients of a quarter of an activation between the activations,
    so that one hole of that size is left. That is stated here as it is: against what the same schedule
    without the updates needs, not against a wider share of so small a prediction.
    """
    chain, x = mlp(depth=12, width=256), jnp.ones((512, 256))
    optimizer = optax.adam(1e-3)
    states = mw.init_states(optimizer, chain)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    plain = mw.profile(chain, x, repeats=1)
    profile = plain.consuming_gradients(size)
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(chain))
    assert profile.fixed_bytes == plain.fixed_bytes - gradients + size
    largest = max(layer.parameter_bytes for layer in plain.layers)
    frontier = mw.frontier(profile)
    for total in (frontier.points[0][0], frontier.points[-1][0]):
        schedule = frontier.at(total)
        assert mw.replay(profile, schedule.runs).peak_bytes + profile.table_bytes == schedule.peak_bytes
        before = mw.replay(plain, schedule.runs).peak_bytes + profile.table_bytes
        assert before <= schedule.peak_bytes <= before + largest
        step = mw.jit(mw.value_and_update(mean_square, schedule, optimizer), donate_argnums=(0, 1))
        compiled = step.lower(chain, states, x).compile()
        without = mw.jit(mw.value_and_grad(mean_square, schedule)).lower(chain, x).compile()
        assert (
            0.8 * schedule.peak_bytes
            < mw.temporaries(compiled)
            < 1.05 * mw.temporaries(without) + largest + x.nbytes
        )
        assert whole_bytes(compiled) < 1.1 * schedule.total_bytes


class TestBadInput:
    def test_optimizers_that_mix_layers(self) -> None:
        """By gradients, by parameters, by the state alone; the repetitions of a stack count as layers."""
        flat, x = mlp(4), jnp.ones((2, 8))
        plan = Schedule(runs=store_all(flat))
        weights = optax.GradientTransformation(
            lambda p: optax.EmptyState(),
            lambda g, s, p=None: (jax.tree.map(lambda a: a * sum(map(jnp.sum, jax.tree.leaves(p))), g), s),
        )
        for chain in (flat, mw.stack(flat, x)):
            for optimizer in (
                optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
                optax.apply_if_finite(optax.sgd(1e-3), 3),
                optax.contrib.dadapt_adamw(1.0),
                weights,
            ):
                step = mw.value_and_update(mean_square, plan, optimizer)
                with pytest.raises(mw.ArgumentError, match="mixes layers"):
                    step(chain, mw.init_states(optimizer, chain), x)

    def test_random_keys_in_states_differ(self) -> None:
        flat, x = mlp(4), jnp.ones((2, 8))
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1.0))
        for chain in (flat, mw.stack(flat, x)):
            states = mw.init_states(optimizer, chain)
            keys = [k for k in jax.tree.leaves(states) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key)]
            data = [tuple(row) for k in keys for row in jax.random.key_data(k).reshape(-1, 2).tolist()]
            assert len(set(data)) == len(data) == len(flat)
            step = mw.value_and_update(mean_square, Schedule(runs=store_all(flat)), optimizer)
            (_, _), after, _ = step(chain, states, x)
            moved = [np.asarray(b.weight - a.weight) for a, b in zip(chain, after) if hasattr(a, "weight")]
            assert not any(np.allclose(moved[0], other) for other in moved[1:])

    def test_states_of_something_else(self) -> None:
        chain, x = mlp(2), jnp.ones((2, 8))
        adam = optax.adam(1e-3)
        step = mw.value_and_update(mean_square, Schedule(runs=store_all(chain)), adam)
        for states in (adam.init(chain), mw.init_states(optax.sgd(0.1), chain), mw.init_states(adam, mlp(3))):
            with pytest.raises(mw.ArgumentError, match="`states`"):
                step(chain, states, x)

    def test_no_optimizer_no_loss(self) -> None:
        plan = Schedule(runs=store_all(mlp(1)))
        with pytest.raises(mw.ArgumentError, match="`optimizer`"):
            mw.value_and_update(mean_square, plan, 3)  # type: ignore[arg-type]
        with pytest.raises(mw.ArgumentError, match="not callable"):
            mw.value_and_update(3, plan, optax.sgd(0.1))  # type: ignore[arg-type]
        chain = mlp(1)
        states = mw.init_states(optax.sgd(0.1), chain)
        step = mw.value_and_update(lambda y: y, plan, optax.sgd(0.1))
        with pytest.raises(mw.ArgumentError, match="one floating-point number"):
            step(chain, states, jnp.ones((2, 8)))

    def test_bytes(self) -> None:
        profile = mw.profile(mlp(1), jnp.ones((2, 8)), repeats=1)
        with pytest.raises(mw.ArgumentError, match="states_bytes=-1"):
            profile.consuming_gradients(-1)
