"""Stacks: repeated blocks with stacked parameters, walked by scans."""

from __future__ import annotations

import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mwplan as mw
from mwplan.layers import Dense, LayerNorm, LeakyReLU, MaxMin
from mwplan.network import rules
from mwplan.network.chain import boundaries, fingerprint, layer_name, repeats
from mwplan.plans.schedule import Run, RunKind, Schedule, shifted, walk
from tests.helpers import mean_square, random_runs, relative_error, segments, store_all

DEPTH = 6


def block(key: Any) -> tuple[Any, ...]:
    """Four layers, of which one keeps its output (tanh, stored), one its input, one bits."""
    a, b = jax.random.split(key)
    return Dense.init(a, 8, 8), jnp.tanh, Dense.init(b, 8, 8), LeakyReLU(0.7)


def stacked(depth: int = DEPTH) -> tuple[mw.Chain, Any]:
    keys = jax.random.split(jax.random.key(0), depth + 2)
    layers = [Dense.init(keys[0], 5, 8)]
    for key in keys[2:]:
        layers += block(key)
    chain, x = mw.Chain([*layers, Dense.init(keys[1], 8, 3)]), jax.random.normal(jax.random.key(1), (4, 5))
    return mw.stack(chain, x), x


def repeated(rng: random.Random, chain: mw.Chain, x: Any) -> tuple[Run, ...]:
    """A schedule whose middle repeats: random runs over one or two blocks, from any phase on."""
    first, span = 1 + rng.randint(0, 3), 4 * rng.choice([1, 1, 1, 2])
    count = (len(chain) - 1 - first) // span
    inner = random_runs(rng, chain, x, first, first + span)
    middle = [shifted(run, i * span) for i in range(count) for run in inner]
    end = first + count * span
    return (
        *random_runs(rng, chain, x, 0, first),
        *middle,
        *random_runs(rng, chain, x, end, len(chain)),
    )


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def check(chain: mw.Chain, x: Any, runs: tuple[Run, ...], tolerance: float) -> Any:
    """The planned gradient is backpropagation's, and the report small."""
    want = jax.grad(lambda c, x: mean_square(c(x)), argnums=(0, 1))(mw.unstack(chain), x)
    step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=runs), wrt_input=True))
    (_, report), (grads, grad_x) = step(chain, x)
    assert relative_error((mw.unstack(grads), grad_x), want) < tolerance, runs
    assert not float(report.worst) > 1e-3, runs
    return report


def test_stacking_keeps_the_function_and_the_fingerprint() -> None:
    chain, x = stacked()
    plain = mw.unstack(chain)
    assert [type(part).__name__ for part in chain.parts] == ["Dense", "Stack", "Dense"]
    assert len(chain) == len(plain) == 2 + 4 * DEPTH
    assert fingerprint(chain) == fingerprint(plain)
    np.testing.assert_allclose(chain(x), plain(x), rtol=1e-5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, chain[9], plain[9]))
    assert "6x(Dense Smooth Dense LeakyReLU)" in repr(chain)


@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6))
def test_schedules_that_repeat_have_the_gradient_of_backpropagation(seed: int) -> None:
    rng = random.Random(seed)
    with jax.enable_x64(True):
        chain, x = jax.tree.map(lambda a: a.astype(jnp.float64), stacked())
        check(chain, x, repeated(rng, chain, x), 1e-9)


def options(chain: mw.Chain, x: Any, find: Any) -> tuple[str, ...]:
    structs = boundaries(chain, x)
    return tuple(
        next(r.name for r in find(one, s) if not isinstance(r, rules.Unavailable))
        for one, s in zip(chain, structs)
    )


def long_runs() -> dict[str, Any]:
    chain = mw.stack(
        mw.Chain(
            [f for k in jax.random.split(jax.random.key(0), 12) for f in (Dense.init(k, 8, 8), MaxMin())]
        ),
        jnp.ones((4, 8)),
    )
    x = jax.random.normal(jax.random.key(1), (4, 8))
    names = options(chain, x, rules.vijp_rules)
    whole = tuple("whole" if i % 6 == 1 else name for i, name in enumerate(names))
    walked = tuple(
        Run(kind=RunKind.MOONWALK, start=s, stop=s + 8, options=names[s : s + 8]) for s in range(0, 24, 8)
    )
    return {
        "one moonwalk run": (Run(kind=RunKind.MOONWALK, start=0, stop=24, options=names),),
        "restarts within a run": (Run(kind=RunKind.MOONWALK, start=0, stop=24, options=whole),),
        "moonwalk within recomputation": (Run(kind=RunKind.RECOMPUTE, start=0, stop=24, inner=walked),),
        "store": store_all(chain),
        "segments": segments(chain, 4),
        "nested": (Run(kind=RunKind.RECOMPUTE, start=0, stop=24, inner=segments(chain, 2)),),
        "chain": (chain, x),
    }


@pytest.mark.parametrize("name", [name for name in long_runs() if name != "chain"])
def test_long_runs(name: str) -> None:
    made = long_runs()
    chain, x = made["chain"]
    report = check(chain, x, made[name], 1e-4)
    assert len(report.runs) == sum(run.kind is RunKind.MOONWALK for run in walk(made[name]))
    if len(report.runs):
        assert bool(jnp.all(report.discrepancy < 1e-4))


def test_invert_over_a_stack() -> None:
    keys = jax.random.split(jax.random.key(0), 8)
    layers = [f for k in keys for f in (Dense.init(k, 8, 8), LeakyReLU(0.7))]
    x = jax.random.normal(jax.random.key(1), (4, 8))
    chain = mw.stack(mw.Chain([jnp.sin, *layers]), x)
    names = options(mw.Chain(layers), x, rules.invert_rules)
    first = Run(kind=RunKind.STORE, start=0, stop=1, options=("vjp",))
    for cut in (17, 9, 8):
        cuts = [1, cut, 17] if cut < 17 else [1, 17]
        inverted = [
            Run(kind=RunKind.INVERT, start=s, stop=e, options=names[s - 1 : e - 1])
            for s, e in itertools.pairwise(cuts)
        ]
        report = check(chain, x, (first, *inverted), 1e-4)
        assert bool(jnp.all(report.discrepancy > 0))


@pytest.mark.parametrize("name", ["one moonwalk run", "segments", "store", "nested"])
def test_depth_costs_no_program(name: str) -> None:
    """The program of a deep stack is as long as that of a shallower one."""

    def lines(depth: int) -> int:
        layers = [
            f for k in jax.random.split(jax.random.key(0), depth) for f in (Dense.init(k, 8, 8), MaxMin())
        ]
        x = jnp.ones((4, 8))
        chain = mw.stack(mw.Chain(layers), x)
        names = options(chain, x, rules.vijp_rules)
        runs = {
            "one moonwalk run": (Run(kind=RunKind.MOONWALK, start=0, stop=len(chain), options=names),),
            "segments": segments(chain, 4),
            "store": store_all(chain),
            "nested": tuple(
                Run(
                    kind=RunKind.RECOMPUTE,
                    start=s,
                    stop=s + 16,
                    inner=tuple(segments(chain, 2)[s // 2 : s // 2 + 8]),
                )
                for s in range(0, len(chain), 16)
            ),
        }[name]
        step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=runs)))
        return len(step.lower(chain, x).as_text().splitlines())

    assert lines(128) < 1.1 * lines(64)


def test_profile_and_plan_of_a_stack_are_those_of_its_layers() -> None:
    chain, x = stacked(3)
    profile = mw.profile(chain, x, repeats=1)
    assert len(profile) == len(chain) == 14
    assert [layer.name for layer in profile.layers] == [type(one).__name__ for one in profile_names(chain)]
    room = profile.table_bytes + sum(profile.activation_bytes)
    schedule = mw.plan(profile, profile.fixed_bytes + room)
    for target in (chain, mw.unstack(chain)):
        grads = jax.grad(lambda c: mean_square(mw.apply(schedule, c, x)))(target)
        assert (
            relative_error(mw.unstack(grads), jax.grad(lambda c: mean_square(c(x)))(mw.unstack(chain))) < 1e-4
        )
    timeline = mw.trace(schedule, chain, x, mean_square, profile=profile)
    assert [e.array_bytes for e in timeline.events] == [e.predicted_array_bytes for e in timeline.events]


def profile_names(chain: mw.Chain) -> list[Any]:
    class tanh:
        pass

    return [tanh() if layer_name(one) == "tanh" else one for one in chain]


def test_deep_stacks_are_profiled_by_a_few_repetitions() -> None:
    chain = mw.Chain(
        [mw.Stack.init(lambda key: (Dense.init(key, 4, 4), LayerNorm.init(key, 4)), jax.random.key(0), 200)]
    )
    visited: set[int] = set()

    def progress(done: int, total: int, name: str) -> None:
        if name == "measuring layers":
            visited.add(done)

    profile = mw.profile(chain, jnp.ones((2, 4)), repeats=1, progress=progress)
    assert len(profile) == 400
    assert visited
    assert len(visited) <= 2 * 8
    assert profile.layers[0] == profile.layers[398]
    assert profile.table_bytes < 16 * len(profile)  # a loop's tables are there once


def test_repeats() -> None:
    assert list(repeats("abababc")) == [(0, 2, 3), (6, 1, 1)]
    assert list(repeats("aaaa")) == [(0, 1, 4)]
    assert list(repeats("abc")) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


class TestBadInput:
    def test_leaves_without_the_axis(self) -> None:
        with pytest.raises(mw.ChainError, match=r"weight.*\[8, 8\].*leading.*depth=3"):
            mw.Stack.of(Dense.init(jax.random.key(0), 8, 8), 3)

    def test_depth(self) -> None:
        with pytest.raises(mw.ChainError, match="depth=0"):
            mw.Stack.of(MaxMin(), 0)

    def test_a_block_that_changes_the_shape(self) -> None:
        chain = mw.Chain([mw.Stack.init(lambda key: Dense.init(key, 8, 4), jax.random.key(0), 2)])
        with pytest.raises(mw.ChainError, match="must return what it takes"):
            mw.profile(chain, jnp.ones((2, 8)))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_loop_within_loops_is_traced_once(levels: int) -> None:
    """Each body once, however deep it stands."""
    traced: list[int] = []

    def once(x: Any) -> Any:
        traced.append(1)
        return jnp.sin(x)

    depth = 4 * 4**levels
    keys = jax.random.split(jax.random.key(0), depth)
    chain, x = (
        mw.Chain([mw.Stack.of((jax.vmap(lambda k: Dense.init(k, 4, 4))(keys), once), depth)]),
        jnp.ones((2, 4)),
    )

    def nested(start: int, stop: int, level: int) -> tuple[Run, ...]:
        if level == 0:
            return tuple(
                Run(kind=RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(start, stop)
            )
        size = (stop - start) // 4
        cuts = range(start, stop, size)
        return tuple(
            Run(kind=RunKind.RECOMPUTE, start=s, stop=s + size, inner=nested(s, s + size, level - 1))
            for s in cuts
        )

    step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=nested(0, 2 * depth, levels))))
    step.lower(chain, x)
    # The shapes of the boundaries, once forward and once backward; each loop's body, and the backward one of
    # the innermost.
    assert len(traced) <= 6 + 3 * (levels + 1)


def test_a_loop_of_one_operation_needs_no_ties() -> None:
    """What ties do between operations, a loop does between its turns; so the body's reads and writes can be
    fused with it."""
    keys = jax.random.split(jax.random.key(0), 32)
    chain = mw.Chain([mw.Stack.of(jax.vmap(lambda k: Dense.init(k, 8, 8))(keys), 32)])
    step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=store_all(chain))))
    bodies = step.lower(chain, jnp.ones((4, 8))).as_text().split("@main")[1].split("func.func private")[1:]
    assert len(bodies) > 2
    assert not any("optimization_barrier" in body for body in bodies)


def test_loops_over_tiny_layers_compile() -> None:
    """XLA:CPU makes calls of small loops, which crash, process and all, on the barriers that plans need."""
    x = jnp.ones((1, 2))
    keys = jax.random.split(jax.random.key(0), 6)
    chain = mw.Chain([f for k in keys for f in (Dense.init(k, 2, 2), LeakyReLU(0.7))])
    stacked = mw.stack(chain, x)
    moonwalk = Run(kind=RunKind.MOONWALK, start=0, stop=12, options=("exact", "divide") * 6)
    for runs in ((moonwalk,), segments(chain, 2)):
        step = mw.jit(mw.value_and_grad(mean_square, Schedule(runs=runs)))
        (_, _), grads = step(stacked, x)
        want = jax.grad(lambda c: mean_square(c(x)))(stacked)
        assert relative_error(grads, want) < 1e-4
