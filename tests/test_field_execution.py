"""What networks as people write them take once compiled: stacked weights, arrays made of constants, losses
with memory of their own, parameters larger than activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.execution.execute import PLAIN
from mwplan.network.constants import tied
from mwplan.network.layer import layer
from mwplan.plans.schedule import Run, RunKind, Schedule
from tests.compilers import GAPS_ON_NEWEST
from tests.helpers import alike, mean_square, relative_error


@layer
class Tanh:
    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.weight)


def dense(depth: int, width: int) -> mw.Chain:
    keys = jax.random.split(jax.random.key(0), depth)
    return mw.Chain([Tanh(jax.random.normal(key, (width, width)) / width**0.5) for key in keys])


def compiled(schedule: Schedule, chain: mw.Chain, x: Any, loss: Any = mean_square) -> int:
    return mw.temporaries(mw.jit(mw.value_and_grad(loss, schedule)).lower(chain, x).compile())


@GAPS_ON_NEWEST
@pytest.mark.parametrize(("width", "batch"), [(16, 1024), (256, 32)])
def test_rows_of_a_stack_come_and_go_with_their_operation(width: int, batch: int) -> None:
    """Weights of a 64th of the activations, and of eight times them: XLA is not to read all at the start."""
    chain, x = dense(8, width), jnp.ones((batch, width))
    stacked = mw.stack(chain, x)
    frontier = mw.frontier(mw.profile(stacked, x, repeats=1), allowed=("store", "recompute"))
    schedule = frontier.at(frontier.least_bytes or 0)
    # Of five activations fragmentation can cost one more: so it does without a stack.
    most = 1.02 * schedule.peak_bytes + x.nbytes
    assert 0.98 * schedule.peak_bytes < compiled(schedule, stacked, x) <= most
    _, got = mw.jit(mw.value_and_grad(mean_square, schedule))(stacked, x)
    want = jax.jit(jax.grad(lambda chain: mean_square(chain(x))))(stacked)
    assert relative_error(got, want) < 1e-5


def test_a_carried_array_is_read_where_it_is_used() -> None:
    """Stacked weights far larger than activations, written out: twice a row, not eight."""
    chain, x = dense(8, 256), jnp.ones((8, 256))
    runs = tuple(Run(kind=RunKind.STORE, start=at, stop=at + 1, options=("vjp",)) for at in range(8))
    inner = Run(kind=RunKind.RECOMPUTE, start=0, stop=3, inner=runs[:3])
    other = Run(kind=RunKind.RECOMPUTE, start=3, stop=5, inner=runs[3:5])
    row = chain.layers[0].weight.nbytes
    needs = compiled(Schedule(runs=(inner, other, *runs[5:])), mw.stack(chain, x), x)
    assert needs < 2.5 * row


def into_zeros(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x).at[..., ::2].set(jnp.tanh(x @ w)[..., ::2])


def recurrent(w: jax.Array, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(row @ w + 0.5 * state)
        return state, state

    return jax.lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


def mapped(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda row: jnp.tanh(row @ w), x)


def sorted_along(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.take_along_axis(x, jnp.argsort(x, axis=-1), axis=-1) @ w)


def largest(w: jax.Array, x: jax.Array) -> jax.Array:
    values, _ = jax.lax.top_k(x @ w, 8)
    return jnp.zeros_like(x).at[..., :8].set(values) + x


def added_up(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(jnp.tanh(x @ w), jnp.arange(len(x)) // 2, len(x))


def reversed_rows(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x[:, jnp.arange(x.shape[1])[::-1]] @ w)


WRITES = (into_zeros, recurrent, mapped, sorted_along, largest, added_up, reversed_rows)


@pytest.mark.parametrize("write", WRITES)
def test_constants_wait_for_the_inputs_of_their_operation(write: Callable[..., jax.Array]) -> None:
    """Same values and derivatives; every array of some size depends on what the operation is given."""
    w, x = jax.random.normal(jax.random.key(0), (8, 8)), jax.random.normal(jax.random.key(1), (6, 8, 8))

    def gradient(w: jax.Array, x: jax.Array) -> Any:
        return jax.vjp(write, w, x)[1](jnp.ones((6, 8, 8)))

    for operation in (write, gradient):
        wanted, got = jax.jit(operation)(w, x), jax.jit(tied(operation))(w, x)
        assert relative_error(got, wanted) < 1e-6
        jaxpr = jax.make_jaxpr(tied(operation))(w, x).jaxpr
        known = {*jaxpr.invars}
        for eqn in jaxpr.eqns:
            if known & {var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)}:
                known.update(eqn.outvars)
            elif eqn.primitive.name != "iota":  # which a tied number is added to
                assert all(var.aval.size * var.aval.dtype.itemsize <= 64 for var in eqn.outvars), eqn


@pytest.mark.parametrize("write", [into_zeros, recurrent])
def test_layers_that_write_into_new_arrays_take_what_is_planned(write: Callable[..., jax.Array]) -> None:
    """Not an array of zeros for each of the eight layers, from the start to the end: at most one activation
    more than planned, for fragmentation."""

    @layer
    class Writes:
        weight: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return write(self.weight, x)

    keys, x = jax.random.split(jax.random.key(0), 8), jnp.ones((64, 32, 32))
    chain = mw.Chain([Writes(0.2 * jax.random.normal(key, (32, 32))) for key in keys])
    profile = mw.profile(chain, x, repeats=1)
    runs = alike(RunKind.STORE, "vjp", 8)
    planned = mw.replay(profile, runs).peak_bytes + profile.table_bytes
    assert compiled(Schedule(runs=runs), chain, x) <= planned + x.nbytes


def chunked(y: jax.Array, head: jax.Array) -> jax.Array:
    """A loss whose logits, of a few rows at a time, are larger than anything in the network."""

    @jax.checkpoint
    def part(rows: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(rows @ head, axis=-1).sum()

    return jax.lax.map(part, y.reshape(4, -1, y.shape[-1])).sum()


def test_a_loss_with_memory_of_its_own_is_planned_for() -> None:
    """And a budget that an error names is kept at the first try."""
    chain, x = dense(6, 64), jax.random.normal(jax.random.key(1), (256, 64))
    head = 0.1 * jax.random.normal(jax.random.key(2), (64, 4096))
    profile = mw.profile(chain, x, repeats=1)
    budget = mw.frontier(profile).least_bytes
    assert budget is not None
    with pytest.raises(mw.InfeasibleError, match=r"of the .* programs that were compiled none fits") as error:
        mw.fit(chunked, chain, x, head, budget=budget, profile=profile)
    assert error.value.least_bytes is not None
    found = mw.fit(chunked, chain, x, head, budget=error.value.least_bytes, profile=profile)
    assert found.temporary_bytes + profile.fixed_bytes <= error.value.least_bytes
    if found.arrangement == 0:
        assert found.temporary_bytes == pytest.approx(found.schedule.peak_bytes, rel=0.02)
    (value, _), grads = found.step(chain, x, head)
    want, truth = jax.value_and_grad(lambda chain: chunked(chain(x), head))(chain)
    assert relative_error((value, grads), (want, truth)) < 1e-5


def test_what_fits_when_compiled_is_not_refused() -> None:
    """Gradients larger than activations: until they are written XLA uses their memory, and steps take less
    than was predicted."""
    chain, x = dense(8, 256), jax.random.normal(jax.random.key(1), (32, 256))
    profile = mw.profile(chain, x, repeats=1)
    for run in (lambda one: one, jax.checkpoint):
        step = mw.jit(jax.value_and_grad(lambda chain, x, run=run: mean_square(through(chain, x, run))))
        plain = step.lower(chain, x).compile()
        budget = profile.fixed_bytes + mw.temporaries(plain)
        found = mw.fit(mean_square, chain, x, budget=budget, profile=profile)
        assert found.temporary_bytes <= mw.temporaries(plain)
        (value, _), grads = found.step(chain, x)
        assert relative_error((value, grads), plain(chain, x)) < 1e-5


def through(chain: mw.Chain, x: Any, run: Callable[[Any], Any]) -> Any:
    for one in chain.layers:
        x = run(lambda one, x: one(x))(one, x)
    return x


def test_the_plain_arrangement_is_of_plain_schedules() -> None:
    chain, x = dense(4, 16), jax.random.normal(jax.random.key(1), (8, 16))
    store = [Run(kind=RunKind.STORE, start=at, stop=at + 1, options=("vjp",)) for at in range(4)]
    again = tuple(Run(kind=RunKind.RECOMPUTE, start=at, stop=at + 1, inner=(store[at],)) for at in range(4))
    want = jax.value_and_grad(lambda chain: mean_square(chain(x)))
    for net in (chain, mw.stack(chain, x)):
        for runs in (tuple(store), again, (again[0], *store[1:])):
            step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=runs), arrangement=PLAIN))
            (value, _), grads = step(net, x)
            assert relative_error((value, grads), want(net)) < 1e-5
    long = Run(kind=RunKind.RECOMPUTE, start=0, stop=4, inner=tuple(store))
    with pytest.raises(mw.ArgumentError, match=r"RECOMPUTE run over layers 1 to 4"):
        mw.apply(Schedule(runs=(long,)), chain, x, arrangement=PLAIN)
