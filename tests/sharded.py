"""Gradients on a mesh of eight virtual devices: what tests/test_sharding.py starts as a program of its own.

How many devices the CPU has is settled when JAX starts, so none of this can share a process with the other
tests. Writes `{check: figure}` as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mwplan as mw
from mwplan.layers import Conv2D, Dense, Flatten, LeakyReLU, MaxMin, OrthogonalDense, Sequential
from mwplan.network import rules
from mwplan.network.chain import boundaries
from mwplan.plans.schedule import Run, RunKind, Schedule
from tests.helpers import binomial, mlp, relative_error, segments, store_all

P = PartitionSpec
#: Networks that are differentiated from within and from outside of `jax.shard_map`: one plain, one stacked.
BOTH_WAYS = ("every run", "stack, walked", "stack, taped")


def local_loss(y: Any, target: Any) -> Any:
    """A mean over examples, so that the mean over the devices' means is the whole batch's."""
    return jnp.mean((jnp.arange(1, y.shape[-1] + 1) * (y - target) ** 2).sum(-1))


def options(chain: mw.Chain, x: Any, find: Any) -> tuple[str, ...]:
    return tuple(
        next(r.name for r in find(one, struct) if not isinstance(r, rules.Unavailable))
        for one, struct in zip(chain, boundaries(chain, x))
    )


def walk(chain: mw.Chain, x: Any, start: int, stop: int) -> Run:
    names = options(chain, x, rules.vijp_rules)[start:stop]
    return Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=names)


def networks() -> dict[str, tuple[mw.Chain, Any, tuple[Run, ...]]]:
    """`(chain, x, runs)`: every kind of run, also nested, on plain and on stacked chains."""
    keys = jax.random.split(jax.random.key(0), 20)
    cnn = mw.Chain(
        [
            Conv2D.init(keys[0], 1, 4, 3),
            jnp.tanh,
            Conv2D.init(keys[1], 4, 4, 3),
            MaxMin(),
            Conv2D.init(keys[2], 4, 8, 2, stride=2, padding="VALID"),
            LeakyReLU(0.5),
            Flatten(3),
            OrthogonalDense.init(keys[3], 128, 128),
            LeakyReLU(0.7),
            Dense.init(keys[4], 128, 8),
        ]
    )
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    x = jax.random.normal(jax.random.key(2), (16, 8))
    invertible = [f for k in keys[:4] for f in (Dense.init(k, 8, 8), LeakyReLU(0.7))]
    names = options(mw.Chain(invertible), x, rules.invert_rules)
    plain = mw.Chain([*invertible, *mlp(4)])
    deep = mw.Chain([f for k in keys[:16] for f in (Dense.init(k, 8, 8), LeakyReLU(0.8))])
    stack = mw.stack(deep, x)
    inverted = options(stack, x, rules.invert_rules)
    inner = (walk(plain, x, 8, 12), *store_all(plain)[12:16])
    recomputed = Run(kind=RunKind.RECOMPUTE, start=0, stop=32, inner=tuple(segments(deep, 4)))
    blocks = mw.stack(mw.Chain([Sequential((Dense.init(k, 8, 8), LeakyReLU(0.8))) for k in keys[:16]]), x)
    return {
        "stack, taped": (blocks, x, binomial(16, 1, 3, options(blocks, x, rules.store_rules)[0])),
        "convolutions": (
            cnn,
            images,
            (walk(cnn, images, 0, 6), *store_all(cnn)[6:8], walk(cnn, images, 8, 10)),
        ),
        "every run": (
            plain,
            x,
            (
                Run(kind=RunKind.INVERT, start=0, stop=8, options=names),
                Run(kind=RunKind.RECOMPUTE, start=8, stop=16, inner=inner),
            ),
        ),
        "stack, recomputed": (stack, x, (recomputed,)),
        "stack, walked": (stack, x, (walk(stack, x, 0, 32),)),
        "stack, inverted": (stack, x, (Run(kind=RunKind.INVERT, start=0, stop=32, options=inverted),)),
    }


def check(name: str, chain: mw.Chain, x: Any, runs: tuple[Run, ...], out: dict[str, float]) -> None:
    """The planned gradients on the mesh against backpropagation on one device."""
    schedule = Schedule(runs=runs)
    target = jax.random.normal(jax.random.key(3), (16, chain(x).shape[-1]))
    want = jax.jit(jax.grad(lambda c, x: local_loss(c(x), target), argnums=(0, 1)))(chain, x)
    data = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    both = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step = mw.value_and_grad(local_loss, schedule, wrt_input=True)

    def put(mesh: Any, tree: Any, spec: Any) -> Any:
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), tree)

    batch = put(data, (x, target), lambda a: P("data"))
    (_, report), grads = mw.jit(step)(put(data, chain, lambda a: P()), *batch)
    out[f"{name}: data-parallel"] = relative_error(grads, want)
    out[f"{name}: data-parallel report"] = float(report.worst)

    # Weights (and their gradients) spread over both axes, where their last axis divides.
    def spread(a: Any) -> Any:
        axis = "model" if a.ndim and a.shape[-1] % 2 == 0 else None
        return P(*[None] * (a.ndim - 1), axis) if a.ndim else P()

    weights = put(both, chain, spread)
    batch = put(both, (x, target), lambda a: P("data"))
    (_, report), grads = mw.jit(step)(weights, *batch)
    out[f"{name}: parameter-sharded"] = relative_error(grads, want)

    manual = functools.partial(jax.shard_map, mesh=data)

    def mean(y: Any, target: Any) -> Any:
        return jax.lax.pmean(local_loss(y, target), "data")

    # 1. The gradient is taken within, of the mean over all devices.
    def within(chain: mw.Chain, x: Any, target: Any) -> Any:
        (value, report), grads = mw.value_and_grad(mean, schedule, wrt_input=True)(chain, x, target)
        return value, report, grads

    inside = manual(within, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P(), (P(), P("data"))))
    _, report, grads = mw.jit(inside)(chain, x, target)
    out[f"{name}: shard_map"] = relative_error(grads, want)
    out[f"{name}: shard_map report"] = float(report.worst)

    if name not in BOTH_WAYS:
        return

    # On axes that types speak of, which is what `jax.make_mesh` makes by default.
    named = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    batch = put(named, (x, target), lambda a: P("data"))
    (_, report), grads = mw.jit(step)(put(named, chain, lambda a: P()), *batch)
    out[f"{name}: explicit axes"] = relative_error(grads, want)
    out[f"{name}: explicit axes report"] = float(report.worst)

    # 2. It is taken of the mapped function.
    mapped = manual(
        lambda c, x, t: mean(mw.apply(schedule, c, x), t),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    grads = mw.jit(jax.grad(mapped, argnums=(0, 1)))(chain, x, target)
    out[f"{name}: grad of shard_map"] = relative_error(grads, want)

    # 3. Without JAX's tracking of what varies, gradients are averaged by hand.
    def by_hand(chain: mw.Chain, x: Any, target: Any) -> Any:
        _, grads = mw.value_and_grad(local_loss, schedule)(chain, x, target)
        return jax.lax.pmean(grads, "data")

    untracked = manual(by_hand, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False)
    out[f"{name}: untracked shard_map"] = relative_error(mw.jit(untracked)(chain, x, target), want[0])


def updates(out: dict[str, float]) -> None:
    """Layers updated as their gradients come, on a mesh: placed by `jax.jit`, and averaged by the optimizer
    within `shard_map`."""
    chain, x, runs = networks()["stack, walked"]
    target, adam = jnp.zeros_like(x), optax.adam(1e-2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    average = optax.chain(optax.stateless(lambda grads, _: jax.lax.pmean(grads, "data")), adam)

    def new_chain(optimizer: Any, *args: Any) -> mw.Chain:
        return mw.value_and_update(local_loss, Schedule(runs=runs), optimizer)(*args)[1]

    alone = mw.jit(functools.partial(new_chain, adam))
    states = mw.init_states(adam, chain)
    want = alone(chain, states, x, target)
    same, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    got = alone(*jax.device_put((chain, states), same), *jax.device_put((x, target), spread))
    out["updates: data-parallel"] = relative_error(got, want)
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    mapped = jax.shard_map(functools.partial(new_chain, average), mesh=mesh, check_vma=False, **specs)
    got = mw.jit(mapped)(chain, mw.init_states(average, chain), x, target)
    out["updates: untracked shard_map"] = relative_error(got, want)
    tracked = jax.shard_map(functools.partial(new_chain, adam), mesh=mesh, **specs)
    try:
        mw.jit(tracked)(chain, states, x, target)
    except mw.ArgumentError as error:
        out["refused"] = "check_vma=False" in str(error)


def offered(profile: mw.Profile, run: Run) -> Run:
    """A run that stores with options that the profile offers: it has none that others are no worse than."""
    if run.kind is RunKind.STORE:
        found = min(profile.layers[run.start].store, key=lambda one: one.residual_bytes)
        return dataclasses.replace(run, options=(found.name,))
    return dataclasses.replace(run, inner=tuple(map(functools.partial(offered, profile), run.inner)))


def memory(out: dict[str, float]) -> None:
    """The temporaries of one device of a data-parallel step against the profile of a sharded input, for three
    schedules."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    chain = jax.device_put(mlp(depth=12, width=64), NamedSharding(mesh, P()))
    x = jax.device_put(jnp.ones((8 * 1024, 64)), NamedSharding(mesh, P("data")))
    profile = mw.profile(chain, x, repeats=1)
    alone = mw.profile(mlp(depth=12, width=64), jnp.ones((1024, 64)), repeats=1)
    out["profile: activations"] = profile.activation_bytes == alone.activation_bytes
    out["profile: fixed"] = profile.fixed_bytes == alone.fixed_bytes
    named = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    explicit = mw.profile(
        jax.device_put(mlp(depth=12, width=64), NamedSharding(named, P())),
        jax.device_put(jnp.ones((8 * 1024, 64)), NamedSharding(named, P("data"))),
        repeats=1,
    )
    out["profile: explicit axes"] = (explicit.activation_bytes, explicit.fixed_bytes) == (
        alone.activation_bytes,
        alone.fixed_bytes,
    )
    both = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    dense = jax.device_put(mlp(1, 8), NamedSharding(both, P()))
    halved = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(both, P(*[None] * (a.ndim - 1), "model"))), dense
    )
    spread = mw.profile(halved, jax.device_put(jnp.ones((8, 8)), NamedSharding(both, P("data"))), repeats=1)
    out["profile: parameter-sharded fixed"] = spread.fixed_bytes == 2 * (8 * 8 + 8) // 2 * 4 + 2 * 8 * 4
    single = mlp(depth=12, width=64)
    plans = {
        "stored": store_all(single),
        "recomputed": segments(single, 6),
        "walked": (walk(single, jnp.ones((1024, 64)), 0, 24),),
    }
    for label, runs in plans.items():
        runs = tuple(map(functools.partial(offered, profile), runs))
        schedule = Schedule(runs=runs)
        step = mw.jit(mw.value_and_grad(lambda y: jnp.mean(y**2), schedule))
        got = step.lower(chain, x).compile()
        one = step.lower(single, jnp.ones((1024, 64))).compile()
        out[f"memory: {label} alone"] = mw.temporaries(one)
        out[f"memory: {label} predicted"] = mw.replay(profile, runs).peak_bytes
        out[f"memory: {label} measured"] = mw.temporaries(got)
        arguments = got.memory_analysis()
        out[f"memory: {label} fixed"] = (
            arguments.argument_size_in_bytes + arguments.output_size_in_bytes - profile.fixed_bytes
        )


def main() -> None:
    """Every check."""
    out: dict[str, float] = {"devices": len(jax.devices())}
    for name, network in networks().items():
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            check(name, *network, out)
    updates(out)
    memory(out)
    print(json.dumps({name: float(np.asarray(figure)) for name, figure in out.items()}))


if __name__ == "__main__":
    main()
