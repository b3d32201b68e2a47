"""Tapes: nested recomputation of identical layers in a few loops."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan as mw
from mwplan import layers as L
from mwplan.common import trees
from mwplan.compilers.compiling import temporaries
from mwplan.execution import taped
from mwplan.network import operations, rules
from mwplan.plans.schedule import Run, RunKind, Schedule, walk
from mwplan.plans.tape import loops, written_out
from mwplan.plans.tape import taped as tape_of
from tests.helpers import binomial, mean_square, relative_error


@given(size=st.integers(2, 60), length=st.integers(1, 5), slots=st.integers(1, 6), keeps=st.booleans())
@settings(max_examples=60, deadline=None)
def test_binomial_schedules_have_a_tape(size: int, length: int, slots: int, keeps: bool) -> None:
    """A tape does every layer forward as often as the schedule, and each backward once from the last on, in
    no more than is alive at the loss."""
    length = min(length, size - 1)
    runs = binomial(size, length, slots, "vjp", start=7)
    tape = tape_of(runs, 10, 13, keeps_input=keeps)
    assert tape is not None
    atoms = [*tape.forward, *tape.backward]
    again = sum(run.stop - run.start for run in walk(runs) if run.kind is RunKind.RECOMPUTE)
    assert sum(a.plain + a.stored for a in atoms) == size + again
    order = [a.last - j for a in (tape.first, *tape.backward) for j in range(a.back)]
    assert order == list(range(size, 0, -1))
    assert tape.room <= (slots - 1) * 10 + length * (23 if keeps else 13)


def test_a_schedule_that_needs_more_later_has_none() -> None:
    """Its stack would be there before it is needed. Nor have those of several options."""
    last = Run(kind=RunKind.STORE, start=9, stop=10, options=("vjp",))
    outer = (Run(kind=RunKind.RECOMPUTE, start=0, stop=9, inner=binomial(9, 1, 4, "vjp")), last)
    assert tape_of(outer, 1, 1, keeps_input=False) is None
    other = dataclasses.replace(last, options=("bits",))
    assert tape_of((*binomial(9, 1, 2, "vjp"), last), 1, 1, keeps_input=False) is not None
    assert tape_of((*binomial(9, 1, 2, "vjp"), other), 1, 1, keeps_input=False) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "bool", "int8", "uint32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5)])
def test_words_keep_every_bit(dtype: str, shape: tuple[int, ...]) -> None:
    """Whatever is written beside it."""
    with jax.enable_x64(True):
        one = (10 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
        tree = {"a": one, "b": jnp.float32(7)}
        stack = taped._written(jnp.zeros(200, jnp.uint32), tree, jnp.int32(11))
        stack = taped._written(stack, tree, jnp.int32(11 + taped._words_of(tree)))
        got = taped._read(stack, trees.struct(tree), jnp.int32(11))
    assert all(bool((a == b).all()) and a.dtype == b.dtype for a, b in zip(got.values(), tree.values()))


def layer(kind: str, key: Any) -> Any:
    """One layer of the stack, of four features."""
    if kind == "dense":
        return (L.Sequential((L.Dense.he(key, 4, 4), L.LeakyReLU(0.5))),)
    first = L.LayerNorm.init(None, 4) if kind == "norm" else L.Smooth("tanh")
    return (L.Sequential((first, L.Dense.he(key, 4, 4), L.LeakyReLU(0.5))),)


def network(kind: str, depth: int, *, stem: bool) -> tuple[mw.Chain, Any]:
    """A stack, behind a layer of its own or not, and its input."""
    keys = jax.random.split(jax.random.key(1), 2)
    stack = mw.Stack.init(functools.partial(layer, kind), keys[0], depth)
    chain = mw.Chain([L.Dense.he(keys[1], 4, 4), stack] if stem else [stack])
    return chain, jax.random.normal(jax.random.key(2), (8, 4))


def option(chain: mw.Chain, x: Any, *, keeps_input: bool) -> str:
    """The name of a STORE option of a stack's layer that shares its input, or does not."""
    layer = chain.layers[-1]
    for rule in rules.store_rules(layer, trees.struct(x)):
        if not isinstance(rule, rules.Unavailable):
            operation = functools.partial(operations.forward, rule=rule)
            _, held = jax.eval_shape(operation, layer, x)
            if held.keeps_input is keeps_input and not held.keeps_output:
                return str(rule.name)
    raise AssertionError("no such option")


@pytest.mark.parametrize(
    ("kind", "keeps", "stem"), [("dense", True, False), ("norm", True, True), ("tanh", False, True)]
)
def test_gradients_equal_those_of_backpropagation(
    kind: str, keeps: bool, stem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with respect to parameters and input, with options that share the input and those that do
    not; the norm under `vmap` too."""
    used = []
    plain = taped.forward
    monkeypatch.setattr(taped, "forward", lambda *args: used.append(1) or plain(*args))
    with jax.enable_x64(True):
        chain, x = jax.tree.map(lambda a: a.astype(jnp.float64), network(kind, 23, stem=stem))
        name = option(chain, x, keeps_input=keeps)
        first = (Run(kind=RunKind.STORE, start=0, stop=1, options=("vjp",)),) if stem else ()
        schedule = Schedule(runs=first + binomial(23, 2, 2, name, start=len(first)))
        assert loops(schedule.runs) < written_out(schedule.runs)
        step = mw.value_and_grad(mean_square, schedule, wrt_input=True)
        _, got = mw.jit(step)(chain, x)
        assert used
        want = jax.grad(lambda chain, x: mean_square(chain(x)), argnums=(0, 1), allow_int=True)(chain, x)
        assert relative_error(got, want) < 1e-12
        if kind == "dense":
            return
        many = jnp.stack([x, 2 * x])
        loss = lambda chain, x: mean_square(mw.apply(schedule, chain, x))  # noqa: E731
        both = mw.jit(jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0)))(chain, many)
        other = jax.vmap(jax.grad(lambda chain, x: mean_square(chain(x)), argnums=1), in_axes=(None, 0))(
            chain, many
        )
        assert relative_error(both, other) < 1e-12


def test_updates_in_place() -> None:
    """The optimizer's step within the loops: what is recomputed afterwards is left of it."""
    chain, x = network("norm", 23, stem=True)
    name = option(chain, x, keeps_input=True)
    first = (Run(kind=RunKind.STORE, start=0, stop=1, options=("vjp",)),)
    schedule = Schedule(runs=first + binomial(23, 1, 3, name, start=1))
    optimizer = optax.sgd(0.1)
    states = mw.init_states(optimizer, chain)
    _, new, _ = mw.jit(mw.value_and_update(mean_square, schedule, optimizer))(chain, states, x)
    grads = jax.grad(lambda chain: mean_square(chain(x)), allow_int=True)(chain)
    want = [
        p - 0.1 * g
        for p, g in zip(jax.tree.leaves(chain), jax.tree.leaves(grads))
        if jnp.issubdtype(p.dtype, jnp.floating)
    ]
    got = [p for p in jax.tree.leaves(new) if jnp.issubdtype(p.dtype, jnp.floating)]
    assert relative_error(got, want) < 1e-5


def compiled(depth: int, slots: int) -> Any:
    """A step of so many layers, whose activations are 1 MiB."""
    keys = jax.random.split(jax.random.key(0), 2)

    def block(key: Any) -> Any:
        return (L.Sequential((L.LayerNorm.init(None, 64), L.Dense.he(key, 64, 64), L.LeakyReLU(0.5))),)

    chain = mw.Chain([L.Dense.he(keys[0], 64, 64), mw.Stack.init(block, keys[1], depth)])
    x = jnp.ones((4096, 64))
    name = option(chain, x, keeps_input=True)
    first = (Run(kind=RunKind.STORE, start=0, stop=1, options=("vjp",)),)
    schedule = Schedule(runs=first + binomial(depth, 1, slots, name, start=1))
    return mw.jit(mw.value_and_grad(mean_square, schedule)).lower(chain, x).compile()


def test_compiled_to_the_same_code_whatever_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the same bytes; a slot more takes an activation more."""
    rooms: list[int] = []
    plain = taped.forward
    monkeypatch.setattr(taped, "forward", lambda *args: rooms.append(args[1].tape.room) or plain(*args))
    short, long, more = compiled(100, 6), compiled(200, 6), compiled(100, 8)
    assert len(long.as_text()) < 1.1 * len(short.as_text())
    assert abs(temporaries(long) - temporaries(short)) < 0.1 * 2**20
    assert abs(temporaries(more) - temporaries(short) - 2 * 2**20) < 0.1 * 2**20
    # Beside the stack: the stretch's input, and what one layer's operations need.
    assert temporaries(short) - 4 * rooms[0] < 7 * 2**20


def test_residuals_smaller_than_an_activation() -> None:
    """With one RECOMPUTE run at a time nothing but they is kept: the stack still holds what loops that take
    no turn would write."""
    chain = mw.Chain([L.Dense.he(jax.random.key(0), 4, 4), mw.Stack.of(L.MaxMin(), 8)])
    x = jax.random.normal(jax.random.key(1), (8, 4))
    name = option(chain, x, keeps_input=False)
    schedule = Schedule(
        runs=(Run(kind=RunKind.STORE, start=0, stop=1, options=("vjp",)), *binomial(8, 1, 1, name, start=1))
    )
    assert loops(schedule.runs) < written_out(schedule.runs)
    grads = mw.jit(jax.grad(lambda chain: mean_square(mw.apply(schedule, chain, x)), allow_int=True))(chain)
    want = jax.grad(lambda chain: mean_square(chain(x)), allow_int=True)(chain)
    assert relative_error(grads, want) < 1e-6
