"""Executing schedules: gradients, memory, reports, and how they live with the rest of JAX."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan as mw
from mwplan.compilers import compiling
from mwplan.layers import Dense, LeakyReLU, MaxMin, layer
from mwplan.network import rules
from mwplan.plans.schedule import Run, RunKind, Schedule
from tests.helpers import mean_square, mlp, random_runs, relative_error, segments, small_cnn, store_all


def schedule_of(*runs: Run) -> Schedule:
    return Schedule(runs=runs)


def walk(start: int, stop: int, *options: str) -> Run:
    return Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=options)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6))
def test_any_schedule_has_the_gradient_of_backpropagation(seed: int) -> None:
    rng = random.Random(seed)
    with jax.enable_x64(True):
        chain, x = small_cnn(seed % 5), jax.random.normal(jax.random.key(seed), (3, 8, 8, 1))
        chain, x = wide(chain), wide(x)
        runs = random_runs(rng, chain, x)

        def loss(chain: mw.Chain, x: Any) -> Any:
            return mean_square(mw.apply(schedule_of(*runs), chain, x))

        want = jax.grad(lambda chain, x: mean_square(chain(x)), argnums=(0, 1))(chain, x)
        assert relative_error(jax.grad(loss, argnums=(0, 1))(chain, x), want) < 1e-9, runs
        (_, report), _ = mw.value_and_grad(mean_square, schedule_of(*runs))(chain, x)
        assert float(report.worst) < 1e-5, runs  # the sketch is float32


def test_value_is_the_chains() -> None:
    chain, x = small_cnn(), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    y = mw.jit(lambda c, x: mw.apply(schedule_of(*segments(chain, 3)), c, x))(chain, x)
    np.testing.assert_allclose(y, chain(x), rtol=1e-6, atol=1e-6)


def temporaries(chain: mw.Chain, x: Any, runs: tuple[Run, ...]) -> int:
    step = mw.jit(jax.grad(lambda c, x: mean_square(mw.apply(schedule_of(*runs), c, x))))
    return mw.temporaries(step.lower(chain, x).compile())


def test_memory_of_compiled_steps() -> None:
    """32 activations of 1 MiB: what each schedule keeps shows in the compiled program, exactly enough to tell
    them apart."""
    chain, x = mlp(depth=16, width=64), jnp.ones((4096, 64))
    size = x.nbytes
    # Dense layers keep their input, leaky ReLU a mask byte an element until packed: the last is 1/32 of an
    # activation.
    exact = tuple(n for i in range(16) for n in ("exact", "divide"))
    stored = temporaries(chain, x, store_all(chain))
    redone = temporaries(chain, x, segments(chain, 8))
    walked = temporaries(chain, x, (walk(0, 32, *exact),))
    assert 16 * size < stored < 19 * size
    assert redone < 10 * size
    assert walked < 5.6 * size  # four activations and the masks


def test_recomputation_is_not_undone_only_with_the_option() -> None:
    """The reason for `mw.jit`: without it the XLA:CPU of JAX 0.10 merges the recomputation away. That of 0.11
    does not."""
    if jax.default_backend() != "cpu":
        pytest.skip("only XLA:CPU drops the barriers")
    chain, x = mlp(depth=16, width=64), jnp.ones((4096, 64))
    runs = segments(chain, 8)
    step = jax.grad(lambda c, x: mean_square(mw.apply(schedule_of(*runs), c, x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mw.PlanUndoneWarning)
        undone = mw.temporaries(jax.jit(step).lower(chain, x).compile())
    kept = temporaries(chain, x, runs)
    assert undone > 1.5 * kept if jax.__version_info__ < (0, 11) else undone < 1.1 * kept


def test_a_jit_that_undoes_the_plan_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 11):
        pytest.skip("only the XLA:CPU of JAX 0.10 drops the barriers")
    monkeypatch.setattr(compiling, "_knows", False)
    chain, x = mlp(2), jnp.ones((2, 8))
    plan = schedule_of(*store_all(chain))
    with pytest.warns(mw.PlanUndoneWarning, match="mw.jit"):
        jax.jit(lambda c, x: mw.apply(plan, c, x))(chain, x)
    mw.apply(plan, chain, x)  # eagerly: nothing is merged, nothing to warn of
    mw.jit(lambda c, x: mw.apply(plan, c, x))(chain, x)
    options = mw.compiler_options()
    jax.jit(lambda c, x: mw.apply(plan, c, x) + 1, compiler_options=options)(chain, x)


def test_an_input_larger_than_planned_warns() -> None:
    """It is differentiated all the same; what is smaller, or not differentiated, is no news."""
    chain, x = mlp(2), jnp.ones((4, 8))
    plan = dataclasses.replace(schedule_of(*store_all(chain)), input_bytes=x.nbytes)
    larger = jnp.ones((6, 8))
    mw.apply(plan, chain, larger)

    def gradient(x: Any) -> Any:
        return mw.jit(jax.grad(lambda c, x: mean_square(mw.apply(plan, c, x))))(chain, x)

    for one in (x, x[:2]):
        gradient(one)
    if jax.device_count() > 1:
        pytest.skip("arrays may lie on several devices: their bytes are not those of one")
    with pytest.warns(mw.InputGrownWarning, match=r"input of 128 B and this one has 192 B"):
        got = gradient(larger)
    assert relative_error(got, jax.grad(lambda c: mean_square(c(larger)))(chain)) < 1e-6
    with pytest.warns(mw.InputGrownWarning):
        mw.value_and_grad(mean_square, plan)(chain, larger)


def test_the_report_is_the_true_error() -> None:
    """A slope of 0.1 loses digits fast: what the run reports is what its last cotangent is off by, within the
    sketch's spread."""
    keys = jax.random.split(jax.random.key(0), 6)
    layers = [f for k in keys for f in (Dense.init(k, 256, 256), LeakyReLU(0.1))][:-1]
    chain = mw.Chain(layers)
    x = jax.random.normal(
        jax.random.key(1), (1, 256)
    )  # of one example the last weight's gradient is as wrong as its cotangent
    plan = schedule_of(walk(0, 11, *(("exact", "divide") * 6)[:-1]))
    (_, report), grads = mw.jit(mw.value_and_grad(mean_square, plan))(chain, x)
    truth = jax.grad(lambda c, x: mean_square(c(x)))(chain, x)
    true = relative_error(grads[10], truth[10])
    assert true > 1e-6
    assert 0.3 * true < float(report.worst) < 3 * true
    assert report.table()[0].stop == 11


@pytest.mark.parametrize("stacked", [False, True])
def test_errors_before_a_whole_cotangent_are_reported(stacked: bool) -> None:
    """Where a whole cotangent is kept the error restarts: it is compared before, in a loop in each turn."""
    keys = jax.random.split(jax.random.key(0), 15)
    chain = mw.Chain([f for key in keys for f in (Dense.init(key, 64, 64), LeakyReLU(0.1))])
    x = jax.random.normal(jax.random.key(1), (1, 64))
    plan = schedule_of(walk(0, 30, *("exact", "divide", "exact", "divide", "whole", "whole") * 5))
    net = mw.stack(chain, x) if stacked else chain
    (_, report), grads = mw.jit(mw.value_and_grad(mean_square, plan))(net, x)
    truth = jax.grad(lambda c: mean_square(c(x)))(chain)
    got = mw.unstack(grads)
    true = max(relative_error(got[i], truth[i]) for i in range(2, 30, 6))
    assert true > 1e-7
    assert 0.3 * true < float(report.worst) < 30 * true
    only = schedule_of(walk(0, 30, *("whole",) * 30))
    (_, report), _ = mw.jit(mw.value_and_grad(mean_square, only))(net, x)
    assert float(report.worst) == 0  # nothing was rebuilt


def test_an_unsafe_run_says_so() -> None:
    keys = jax.random.split(jax.random.key(0), 32)
    chain = mw.Chain([f for k in keys for f in (Dense.init(k, 16, 16), LeakyReLU(0.1))])
    x = jax.random.normal(jax.random.key(1), (64, 16))
    (_, report), _ = mw.value_and_grad(mean_square, schedule_of(walk(0, 64, *("exact", "divide") * 32)))(
        chain, x
    )
    assert not float(report.worst) < 1e-2


def test_the_report_asks_for_no_more_of_the_last_sweep() -> None:
    """Layers without parameters at a run's end are not rebuilt for the report: no gradient needs them."""
    keys = jax.random.split(jax.random.key(0), 8)
    chain = mw.Chain([f for key in keys for f in (Dense.init(key, 64, 64), MaxMin())])
    x = jax.random.normal(jax.random.key(1), (4096, 64))
    plan = schedule_of(*(walk(s, s + 2, "exact", "undo") for s in range(0, 16, 2)))

    def flops(step: Any) -> float:
        return mw.jit(step).lower(chain, x).compile().cost_analysis()["flops"]

    silent = flops(jax.value_and_grad(lambda c, x: mean_square(mw.apply(plan, c, x))))
    # The sketches themselves take 6% here, where layers are small; the layers rebuilt would take 25% more.
    assert flops(mw.value_and_grad(mean_square, plan)) < 1.1 * silent


def test_invert_runs_report_too() -> None:
    chain, x = mlp(4), jax.random.normal(jax.random.key(0), (16, 8))
    names = tuple(rules.invert_rules(one, x)[0].name for one in chain)
    plan = schedule_of(Run(kind=RunKind.INVERT, start=0, stop=8, options=names))
    (_, report), grads = mw.jit(mw.value_and_grad(mean_square, plan))(chain, x)
    assert relative_error(grads, jax.grad(lambda c: mean_square(c(x)))(chain)) < 1e-4
    assert report.runs == ((0, 8, RunKind.INVERT),)
    assert 0 < float(report.worst) < 1e-4
    scaled = dataclasses.replace(plan, report_scales=((100.0, 0.01),))
    (_, other), _ = mw.jit(mw.value_and_grad(mean_square, scaled))(chain, x)
    want = np.hypot(100 * report.discrepancy, np.sqrt(0.01 * report.discrepancy))
    np.testing.assert_allclose(other.discrepancy, want, rtol=1e-4)
    assert str(report).startswith("estimated relative error of the gradients, by run:\n  layers 1 to ")
    with pytest.raises(mw.ArgumentError, match="report_scales"):
        dataclasses.replace(plan, report_scales=((1.0, 0.0),) * 2)


class TestAtHome:
    """The planned chain under the transformations and libraries that people use."""

    def plan(self) -> tuple[mw.Chain, Any, Schedule]:
        chain, x = mlp(3), jax.random.normal(jax.random.key(0), (4, 8))
        walked = walk(2, 6, "exact", "divide", "exact", "whole")
        return chain, x, schedule_of(*segments(mlp(1), 2), walked)

    def test_vmap_over_examples_and_over_models(self) -> None:
        chain, x, plan = self.plan()
        per_example = jax.vmap(jax.grad(lambda c, x: mean_square(mw.apply(plan, c, x))), in_axes=(None, 0))
        want = jax.vmap(jax.grad(lambda c, x: mean_square(c(x))), in_axes=(None, 0))
        assert relative_error(per_example(chain, x), want(chain, x)) < 1e-4
        models = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), chain)
        planned = jax.vmap(lambda c: jax.grad(lambda c: mean_square(mw.apply(plan, c, x)))(c))(models)
        plain = jax.vmap(lambda c: jax.grad(lambda c: mean_square(c(x)))(c))(models)
        assert relative_error(planned, plain) < 1e-4

    def test_optax_and_donation(self) -> None:
        import optax

        chain, x, plan = self.plan()
        optimizer = optax.adam(1e-2)
        state = optimizer.init(chain)

        def step(chain: mw.Chain, state: Any, x: Any) -> Any:
            (loss, _), grads = mw.value_and_grad(mean_square, plan)(chain, x)
            updates, state = optimizer.update(grads, state, chain)
            return optax.apply_updates(chain, updates), state, loss

        run = mw.jit(step, donate_argnums=(0, 1))
        losses = []
        for _ in range(20):
            chain, state, loss = run(chain, state, x)
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]

    def test_gradient_accumulation_in_a_scan(self) -> None:
        chain, x, plan = self.plan()

        def total(chain: mw.Chain, xs: Any) -> Any:
            def one(sums: Any, x: Any) -> Any:
                grads = jax.grad(lambda c: mean_square(mw.apply(plan, c, x)))(chain)
                return jax.tree.map(jnp.add, sums, grads), None

            return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, chain), xs)[0]

        xs = jnp.stack([x, 2 * x])
        want = jax.grad(lambda c: mean_square(c(x)) + mean_square(c(2 * x)))(chain)
        assert relative_error(mw.jit(total)(chain, xs), want) < 1e-4

    def test_extra_arguments_aux_and_input_gradient(self) -> None:
        chain, x, plan = self.plan()
        target = jnp.ones((4, 8))

        def loss(y: Any, target: Any) -> Any:
            return mean_square(y, target), {"mean": y.mean()}

        call = mw.jit(mw.value_and_grad(loss, plan, has_aux=True, wrt_input=True))
        ((value, aux), _), (grads, grad_x) = call(chain, x, target)
        want = jax.grad(lambda c, x: mean_square(c(x), target), argnums=(0, 1))(chain, x)
        assert relative_error((grads, grad_x), want) < 1e-4
        np.testing.assert_allclose(value, mean_square(chain(x), target), rtol=1e-5)
        np.testing.assert_allclose(aux["mean"], chain(x).mean(), rtol=1e-4, atol=1e-6)

    def test_pytree_activations_and_leaves_that_are_no_parameters(self) -> None:
        @layer
        class Embed:
            table: Any
            offset: Any  # integers: structure of the data, not a parameter

            def __call__(self, x: Any) -> Any:
                return {"h": self.table[x["tokens"] + self.offset], "skip": x["scale"] * 2}

        def head(z: Any) -> Any:
            return jnp.tanh(z["h"]).sum(-1) * z["skip"]

        chain = mw.Chain([Embed(jax.random.normal(jax.random.key(0), (7, 3)), jnp.int32(1)), head])
        x = {"tokens": jnp.array([0, 2, 5]), "scale": jnp.array([1.0, 2.0, 3.0])}
        for runs in (store_all(chain), segments(chain, 2), (walk(0, 2, "whole", "whole"),)):
            (_, _), (grads, grad_x) = mw.value_and_grad(mean_square, schedule_of(*runs), wrt_input=True)(
                chain, x
            )
            want = jax.grad(lambda t: mean_square(chain_with(chain, t)(x)))(chain[0].table)
            assert relative_error(grads[0].table, want) < 1e-5
            assert grads[0].offset is None
            assert grad_x["tokens"] is None
            assert grad_x["scale"].shape == (3,)

    def test_bfloat16_activations(self) -> None:
        chain, x, plan = self.plan()
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), chain)
        grads = mw.jit(jax.grad(lambda c, x: mean_square(mw.apply(plan, c, x)).astype(jnp.float32)))(
            narrow, x.astype(jnp.bfloat16)
        )
        want = jax.grad(lambda c: mean_square(c(x)))(chain)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
        assert relative_error(grads, want) < 0.1

    def test_random_keys_in_layers_replay(self) -> None:
        @layer
        class Dropout:
            key: Any

            def __call__(self, x: Any) -> Any:
                return jnp.where(jax.random.bernoulli(self.key, 0.5, x.shape), x, 0.0)

        dense = Dense.init(jax.random.key(0), 8, 8)
        chain = mw.Chain([dense, Dropout(jax.random.key(7)), dense])
        x = jax.random.normal(jax.random.key(1), (4, 8))
        _, got = mw.jit(mw.value_and_grad(mean_square, schedule_of(*segments(chain, 3))))(chain, x)
        want = jax.grad(lambda w: mean_square(mw.Chain([w, chain[1], w])(x)))(dense)
        summed = jax.tree.map(jnp.add, got[0], got[2])
        assert relative_error(summed, want) < 1e-5

    @pytest.mark.parametrize("stacks", [False, True])
    @pytest.mark.parametrize("kind", ["nested", "walked", "stored"])
    def test_dropout_replays_under_every_run(self, kind: str, stacks: bool) -> None:
        """Recomputation, the M sweep and scans over stacked keys see the same randomness as the forward
        pass."""

        @layer
        class Dropout:
            key: Any

            def __call__(self, x: Any) -> Any:
                return jnp.where(jax.random.bernoulli(self.key, 0.5, x.shape), 2 * x, 0.0)

        keys = jax.random.split(jax.random.key(0), 8)
        plain = mw.Chain([f for k in keys for f in (Dense.init(k, 8, 8), Dropout(k))])
        x = jax.random.normal(jax.random.key(1), (4, 8))
        runs = {
            "nested": (Run(kind=RunKind.RECOMPUTE, start=0, stop=16, inner=segments(plain, 4)),),
            "walked": (walk(0, 16, *("exact", "whole") * 8),),
            "stored": store_all(plain),
        }[kind]
        want = jax.grad(lambda c: mean_square(c(x)), allow_int=True)(plain)
        chain = mw.stack(plain, x) if stacks else plain
        _, grads = mw.jit(mw.value_and_grad(mean_square, schedule_of(*runs)))(chain, x)
        got = jax.tree.leaves(mw.unstack(grads))
        assert (
            relative_error(got, [leaf for i in range(0, 16, 2) for leaf in jax.tree.leaves(want[i])]) < 1e-4
        )

    def test_bfloat16_activations_invert_in_float32(self) -> None:
        """Through sixteen vijps the gradient is as good as bfloat16 backpropagation's: inverses in bfloat16
        would lose it."""
        chain, x = mlp(8), jax.random.normal(jax.random.key(0), (16, 8))
        plan = schedule_of(walk(0, 16, *("exact", "divide") * 8))
        truth = jax.grad(lambda c: mean_square(c(x)))(chain)
        narrow, low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (chain, x))

        def loss(y: Any) -> Any:
            return mean_square(y.astype(jnp.float32))

        (_, report), grads = mw.jit(mw.value_and_grad(loss, plan))(narrow, low)
        plain = mw.jit(jax.grad(lambda c: loss(c(low))))(narrow)
        assert grads[0].weight.dtype == jnp.bfloat16
        assert relative_error(grads, truth) < 2 * relative_error(plain, truth)
        assert float(report.worst) < 1e-2

    def test_float32_weights_of_bfloat16_activations(self) -> None:
        """Master weights, cast in the layer: gradients come in the weights' type."""

        @layer
        class Mixed:
            dense: Any

            def __call__(self, x: Any) -> Any:
                return jax.tree.map(lambda a: a.astype(x.dtype), self.dense)(x)

        chain = mw.Chain([Mixed(one) for one in mlp(4)][::2])
        x = jax.random.normal(jax.random.key(0), (4, 8), jnp.bfloat16)
        want = jax.grad(lambda c: mean_square(c(x.astype(jnp.float32))))(chain)
        for runs in (store_all(chain), segments(chain, 2), (walk(0, 4, *["whole"] * 4),)):
            got = mw.jit(
                jax.grad(
                    lambda c, runs=runs: mean_square(mw.apply(schedule_of(*runs), c, x)).astype("float32")
                )
            )(chain)
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
            assert relative_error(got, want) < 0.1

    def test_transformations_of_stacks(self) -> None:
        """Per-example gradients, accumulation and `optax` with donation, where the schedule is a scan."""
        import optax

        plain, x = mlp(8), jax.random.normal(jax.random.key(0), (4, 8))
        chain = mw.stack(plain, x)
        plan = schedule_of(*segments(plain, 2)[:4], walk(8, 16, *("exact", "divide") * 4))

        def gradient(chain: mw.Chain, x: Any) -> Any:
            return jax.grad(lambda c: mean_square(mw.apply(plan, c, x)))(chain)

        def truth(chain: mw.Chain, x: Any) -> Any:
            return jax.grad(lambda c: mean_square(c(x)))(chain)

        over = (None, 0)
        got = mw.jit(jax.vmap(gradient, in_axes=over))(chain, x)
        assert relative_error(got, jax.vmap(truth, in_axes=over)(chain, x)) < 1e-4

        def summed(chain: mw.Chain, xs: Any) -> Any:
            def one(sums: Any, x: Any) -> Any:
                return jax.tree.map(jnp.add, sums, gradient(chain, x)), None

            return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, chain), xs)[0]

        want = jax.tree.map(jnp.add, truth(chain, x), truth(chain, 2 * x))
        assert relative_error(mw.jit(summed)(chain, jnp.stack([x, 2 * x])), want) < 1e-4

        optimizer = optax.adam(1e-2)

        def step(chain: mw.Chain, state: Any, x: Any) -> Any:
            (loss, _), grads = mw.value_and_grad(mean_square, plan)(chain, x)
            updates, state = optimizer.update(grads, state, chain)
            return optax.apply_updates(chain, updates), state, loss

        run, state, losses = mw.jit(step, donate_argnums=(0, 1)), optimizer.init(chain), []
        for _ in range(20):
            chain, state, loss = run(chain, state, x)
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]


def chain_with(chain: mw.Chain, table: Any) -> mw.Chain:
    return mw.Chain([type(chain[0])(table, chain[0].offset), chain[1]])


class TestBadInput:
    def test_second_derivatives(self) -> None:
        chain, x = mlp(1), jnp.ones((2, 8))

        def loss(x: Any) -> Any:
            return mean_square(mw.apply(schedule_of(*store_all(chain)), chain, x))

        for twice in (jax.grad(lambda x: jax.grad(loss)(x).sum()), jax.hessian(loss)):
            with pytest.raises(mw.SecondDerivativeError, match="plain chain"):
                twice(x)

    def test_another_chain(self) -> None:
        chain, x = mlp(2), jnp.ones((2, 8))
        profile = mw.profile(chain, x, repeats=1)
        plan = mw.plan(profile, "1GiB")
        mw.apply(plan, mlp(2, seed=5), jnp.ones((3, 8)))  # other weights and batch size are the same chain
        with pytest.raises(mw.ScheduleMismatchError, match="covers 4 layers and the chain has 6"):
            mw.apply(plan, mlp(3), x)
        with pytest.raises(mw.ScheduleMismatchError, match="another chain"):
            mw.apply(plan, mlp(2, width=9), jnp.ones((2, 9)))

    def test_no_chain_no_schedule_no_loss(self) -> None:
        chain, x = mlp(1), jnp.ones((2, 8))
        plan = schedule_of(*store_all(chain))
        with pytest.raises(mw.ChainError, match=r"mw.Chain"):
            mw.apply(plan, list(chain), x)  # type: ignore[arg-type]
        with pytest.raises(mw.ArgumentError, match="`schedule`"):
            mw.apply("plan", chain, x)  # type: ignore[arg-type]
        with pytest.raises(mw.ArgumentError, match="not callable"):
            mw.value_and_grad(3, plan)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "loss", [lambda y: y, lambda y: 1.0, lambda y: (y.sum(), 1), lambda y: y.argmax()]
    )
    def test_losses_that_are_not_scalars(self, loss: Any) -> None:
        chain, x = mlp(1), jnp.ones((2, 8))
        with pytest.raises(mw.ArgumentError, match="one floating-point number"):
            mw.value_and_grad(loss, schedule_of(*store_all(chain)))(chain, x)

    def test_empty_chains_and_what_is_no_layer(self) -> None:
        with pytest.raises(mw.ChainError, match="empty"):
            mw.Chain([])
        with pytest.raises(mw.ChainError, match=r"layers\[1\].*not callable"):
            mw.Chain([jnp.tanh, 3])  # type: ignore[list-item]
        with pytest.raises(mw.ChainError, match="sequence"):
            mw.Chain(jnp.tanh)  # type: ignore[arg-type]

    def test_a_layer_that_does_not_accept_its_input(self) -> None:
        with pytest.raises(mw.ChainError, match=r"layer 1 \(Dense\).*float32\[2, 9\]"):
            mw.profile(mlp(1), jnp.ones((2, 9)))

    def test_an_option_that_the_layer_lacks(self) -> None:
        chain, x = mlp(1), jnp.ones((2, 8))
        with pytest.raises(mw.ScheduleMismatchError, match="'magic' of layer 1"):
            jax.grad(lambda c: mean_square(mw.apply(schedule_of(walk(0, 2, "magic", "divide")), c, x)))(chain)
