"""What a layer keeps, any set of the values between its forward and its backward pass."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import mwplan as mw
from mwplan import layers as ml
from mwplan.common import platforms, trees
from mwplan.network import kept, operations, residuals, rules
from mwplan.network.layer import layer
from mwplan.plans.schedule import Run, RunKind, Schedule
from mwplan.profiling import trades
from mwplan.targets.devices import DEVICES
from tests.helpers import mean_square, relative_error


@layer
class Block:
    """Attention and a branch of two products, with names."""

    mix: Any
    up: Any
    down: Any

    def __call__(self, x: Any) -> Any:
        """Applies the block."""
        v = checkpoint_name(x @ self.mix, "mixed")
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((x.shape[-2],) * 2, bool)), v @ x.mT, -jnp.inf))
        x = x + checkpoint_name(weights @ v, "attended")
        return x + jax.nn.relu(jax.jit(jnp.sin)(x @ self.up)) @ self.down


def block(width: int = 8, inner: int = 32, key: int = 0) -> Block:
    keys = jax.random.split(jax.random.key(key), 3)
    shapes = (width, width), (width, inner), (inner, width)
    return Block(*(jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes)))


@layer
class Picked:
    """Pytrees, integers and a loop: what a mask lets through of one leaf, beside another."""

    weight: Any

    def __call__(self, x: Any) -> Any:
        """Applies the layer."""
        carried, rows = jax.lax.scan(lambda c, row: (jnp.tanh(c + row @ self.weight),) * 2, x["a"][0], x["a"])
        return {"a": jnp.where(x["at"][:, None] > 1, rows, x["a"] ** 2), "b": carried, "at": x["at"] + 1}


def picked() -> tuple[Any, Any]:
    x = {"a": jax.random.normal(jax.random.key(1), (4, 3)), "at": jnp.arange(4), "b": jnp.ones(3)}
    return Picked(jax.random.normal(jax.random.key(2), (3, 3))), x


LAYERS = {
    "block": lambda: (block(), jax.random.normal(jax.random.key(7), (2, 6, 8))),
    "pytrees": picked,
    "half": lambda: (
        jax.tree.map(lambda a: a.astype(jnp.bfloat16), block()), jnp.ones((2, 6, 8), jnp.bfloat16) / 2,
    ),
    "norm": lambda: (
        ml.Sequential((ml.LayerNorm.init(None, 8), ml.Dense.init(jax.random.key(3), 8, 8), ml.MaxMin())),
        jax.random.normal(jax.random.key(4), (4, 8)),
    ),
}  # fmt: skip


def cotangents(y: Any) -> Any:
    """Of arrays their own shape, of integers none."""
    return jax.tree.map(
        lambda a: (
            jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
            if trees.is_inexact(a)
            else trees.no_cotangent(a)
        ),
        y,
    )


def keepable(whole: kept.Joint) -> list[int]:
    return [i for i, var in enumerate(whole.values) if var.aval.dtype != jax.dtypes.float0]


@pytest.mark.parametrize("name", LAYERS)
def test_any_set_gives_the_gradients_of_jax(name: str) -> None:
    """None, all, random ones."""
    one, x = LAYERS[name]()
    whole, rng = kept.joint(one, x), random.Random(0)
    every = keepable(whole)
    sets = [(), tuple(every), *(tuple(sorted(rng.sample(every, min(len(every), n)))) for n in (1, 2, 4))]

    @jax.jit
    def passes(one: Any, x: Any) -> Any:
        y = one(x)
        found = []
        for some in sets:
            rule = kept.KeepStore(whole.name(some))
            got, held = operations.forward(one, x, rule=rule)
            found.append((got, operations.store_backward(one, held, x, got, cotangents(y), rule=rule)))
        return (y, rules.layer_vjp(one, x, cotangents(y))), found

    want, found = passes(one, x)
    for got in found:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if not trees.is_float0(a):
                tolerance = 0.05 if name == "half" else 1e-5
                np.testing.assert_allclose(a.astype(float), b.astype(float), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["nothing", "", "0"])
def test_on_tpus_what_is_made_again_depends_on_the_cotangent(name: str) -> None:
    """Barriers make nothing wait there. The gradients are the same."""
    one, x = LAYERS["block"]()
    whole = kept.joint(one, x)
    some = tuple(int(number) for number in name if number.isdigit())
    rule = rules.SMALLER[1] if name == "nothing" else kept.KeepStore(whole.name(some))
    y, held = operations.forward(one, x, rule=rule)

    def backward(held: Any, ct: Any) -> Any:
        shared = (x if held.keeps_input else None), (y if held.keeps_output else None)
        return operations.store_backward(one, held, *shared, ct, rule=rule)

    want, ct = backward(held, cotangents(y)), cotangents(y)
    assert "is_finite" not in str(jax.make_jaxpr(backward)(held, ct))
    with platforms.lowering_for("tpu"):
        assert "is_finite" in str(jax.make_jaxpr(backward)(held, ct))
        got = backward(held, ct)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_the_set() -> None:
    """And the input; nothing else."""
    one, x = LAYERS["block"]()
    whole = kept.joint(one, x)
    product = next(i for i in keepable(whole) if whole.values[i].aval.shape == (2, 6, 32))
    for some in ((), (product,)):
        rule = kept.KeepStore(whole.name(some))
        held = jax.eval_shape(functools.partial(operations.forward, rule=rule), one, x)[1]
        assert held.keeps_input
        assert residuals.new_bytes(held) == len(some) * 2 * 6 * 32 * 4


@pytest.mark.parametrize("name", ["block", "pytrees"])
def test_sets_without_a_schedule(name: str) -> None:
    """What `fitted.policy()` does with them."""
    one, x = LAYERS[name]()
    whole = kept.joint(one, x)
    some = whole.name(keepable(whole)[::3])

    def loss(apply: Any, one: Any, x: Any) -> Any:
        return sum(
            jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(apply(one, x)) if trees.is_inexact(leaf)
        )

    def gradients(apply: Any) -> Any:
        return jax.grad(functools.partial(loss, apply), argnums=(0, 1), allow_int=True)(one, x)

    got = gradients(lambda one, x: kept.applied(one, x, some))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients(lambda one, x: one(x))), strict=True):
        if not trees.is_float0(a):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_names_come_of_the_program() -> None:
    """Of arrays, of shapes, and of another trace alike; not of another layer."""
    one, x = LAYERS["block"]()
    name = kept.joint(one, x).name((3, 5))
    assert kept.joint(trees.struct(one), trees.struct(x)).name((5, 3)) == name
    again = kept.Joint(trees.struct(one), trees.struct(x))
    assert again.name((3, 5)) == name
    assert (again == kept.joint(one, x), hash(again)) == (True, hash(kept.joint(one, x)))
    other = kept.joint(one, x[:1])
    assert other.name((3, 5)) != name
    assert other != again
    assert kept.store_rules(one, x, name)[-1] == kept.KeepStore(name)
    assert kept.store_rules(one, x[:1], name) == rules.store_rules(one, x[:1])
    assert kept.store_rules(one, x, name + "999") == rules.store_rules(one, x)


def test_schedules_with_sets_run(recwarn: Any) -> None:
    """From a file; written out, in loops, and within `jax.shard_map`."""
    x = jax.random.normal(jax.random.key(5), (4, 6, 8))
    net = mw.Chain([block(key=i) for i in range(4)])
    whole = kept.joint(net[0], x)
    names = [whole.name(some) for some in [trades.candidates(trades.Problem(whole, DEVICES["h200"]))[1]] * 4]
    runs = tuple(Run(kind=RunKind.STORE, start=i, stop=i + 1, options=(n,)) for i, n in enumerate(names))
    schedule = Schedule.from_json(Schedule(runs=runs).to_json())
    for chain in (net, mw.stack(net, x)):
        want = jax.grad(lambda chain: mean_square(chain(x)))(chain)
        assert relative_error(mw.jit(mw.value_and_grad(mean_square, schedule))(chain, x)[1], want) < 1e-5
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    local = jax.shard_map(
        lambda net, x: jax.grad(lambda net: mean_square(mw.apply(schedule, net, x)))(net),
        mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(),
    )  # fmt: skip
    want = jax.grad(lambda net: mean_square(net(x)))(net)
    assert relative_error(mw.jit(local)(net, x), want) < 1e-5
    with pytest.raises(mw.ScheduleMismatchError, match="profile and plan again"):
        mw.value_and_grad(mean_square, schedule)(net, x[:2])


def options(one: Any, x: Any, device: str = "h200", below: int = 1 << 62) -> dict[str, int]:
    """By name, the bytes that each offered set keeps beside the input."""
    found = {}
    for rule in trades.store_rules(trees.struct(one), trees.struct(x), DEVICES[device], below=below):
        held = jax.eval_shape(functools.partial(operations.forward, rule=rule), one, x)[1]
        found[rule.name] = residuals.new_bytes(held)
    return found


@pytest.mark.parametrize("device", ["h200", "laptop", "v5e"])
def test_a_block_has_few_sets_that_all_differ(device: str) -> None:
    one, x = block(64, 256), jax.ShapeDtypeStruct((8, 512, 64), jnp.float32)
    found = options(one, x, device)
    assert next(iter(found)) == "nothing"
    sizes = list(found.values())
    assert 3 <= len(sizes) <= trades.MOST + 2
    step = trades.LEAST_SAVED * trees.nbytes(x)
    # The last may be a little less than the one before, so that nothing fits that is not offered.
    assert sizes[0] < sizes[1]
    assert all(b - a >= step for a, b in itertools.pairwise(sizes[1:]))
    # Its scores are as large as all else together: some set is without them.
    scores = 8 * 512 * 512 * 4
    assert any(0 < size < scores for size in sizes)


def test_names_in_the_layer_are_candidates() -> None:
    one, x = LAYERS["block"]()
    whole = kept.joint(one, x)
    named = {e.params["name"]: whole.number[e.outvars[0]] for e in whole.before if e.primitive.name == "name"}
    found = trades.candidates(trades.Problem(whole, DEVICES["h200"]))
    assert {(named["mixed"],), (named["attended"],)} & {*found}
    assert () in found


def test_thinning() -> None:
    """Nothing that keeps more and takes longer, nothing that saves next to nothing; at most `MOST`, and what
    needs least in all."""

    def trade(nbytes: int, time_ns: float, workspace_bytes: int = 0) -> trades.Trade:
        return trades.Trade(kept=(nbytes,), nbytes=nbytes, time_ns=time_ns, workspace_bytes=workspace_bytes)

    found = [trade(100, 1), trade(99, 2), trade(60, 3), trade(70, 4), trade(10, 9)]
    assert [one.nbytes for one in trades.thinned(found, below=100, step=5)] == [10, 60]
    many = [trade(10 * i, 100 - i, workspace_bytes=1000 * (i != 3)) for i in range(10)]
    chosen = trades.thinned(many, below=1000, step=5)
    assert len(chosen) <= trades.MOST + 1
    assert {0, 30, 90} <= {one.nbytes for one in chosen}
    assert trades.thinned(many, below=0, step=5) == []


def test_keeping_nothing_is_offered_where_it_keeps_less() -> None:
    """Of a function of which `jax.vjp` keeps its input and one array more; so that a plan fits wherever
    `jax.checkpoint` of every layer does."""

    def twice(x: Any) -> Any:
        return x * jnp.sin(x)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert "nothing" in [rule.name for rule in operations.store_rules(twice, x)]
    profile = mw.estimate(mw.Chain([twice] * 4), x, device="laptop")
    assert all("nothing" in [o.name for o in one.store] for one in profile.layers)


def test_an_output_may_be_a_number() -> None:
    def numbered(x: Any) -> Any:
        return jnp.tanh(jnp.sin(x[0]) @ jnp.eye(16)) * 2, jnp.float32(1.5)

    chain = mw.Chain([numbered, lambda x: x[0] * x[1]])
    x = (jnp.linspace(0.0, 1.0, 8 * 16).reshape(8, 16), jnp.float32(0))
    options = mw.estimate(chain, x, device="laptop", compiled=False).layers[0].store
    assert any(option.name.startswith(kept.PREFIX) for option in options)
    last = Run(kind=RunKind.STORE, start=1, stop=2, options=("vjp",))
    want = jax.grad(lambda x: mean_square(chain(x)))(x)
    for option in options:
        runs = (Run(kind=RunKind.STORE, start=0, stop=1, options=(option.name,)), last)
        step = mw.value_and_grad(mean_square, Schedule(runs=runs), wrt_input=True)
        assert relative_error(mw.jit(step)(chain, x)[1][1], want) < 1e-6
