"""What works in plain JAX works in a plan: callbacks, strict configurations, collectives."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from mwplan.common.sizes import parse_bytes
from mwplan.network import operations, rules
from mwplan.network.layer import layer
from mwplan.plans.schedule import RunKind
from tests.helpers import alike, mean_square, relative_error
from tests.layer_rows import ROWS, arrays


@pytest.mark.parametrize("name", sorted(ROWS))
def test_no_layer_promotes_ranks(name: str) -> None:
    """All sweeps of every layer, traced as `jax_numpy_rank_promotion="raise"` wants it."""
    layer, x, ct = arrays(name)

    def stored(layer: Any, x: Any, rule: Any) -> Any:
        y, held = operations.forward(layer, x, rule=rule)
        return operations.store_backward(layer, held, x, y, ct, rule=rule)

    def walked(layer: Any, x: Any, rule: Any) -> Any:
        y, held = operations.forward(layer, x, rule=rule)
        ct_in, fragment = operations.reverse(layer, held, x, y, ct, rule=rule)
        ct_out = operations.vijp(layer, x, ct_in, fragment, rule=rule)
        return operations.advance(layer, x, ct_out, last=False)

    def inverted(layer: Any, x: Any, rule: Any) -> Any:
        y, held = operations.forward(layer, x, rule=rule)
        return operations.invert_backward(layer, held, y, ct, None, rule=rule)

    with jax.numpy_rank_promotion("raise"):
        for call, find in (
            (stored, rules.store_rules),
            (walked, rules.vijp_rules),
            (inverted, rules.invert_rules),
        ):
            for rule in find(layer, x):
                if not isinstance(rule, rules.Unavailable):
                    jax.eval_shape(lambda layer, x: call(layer, x, rule), layer, x)  # noqa: B023


@layer
class Centred:
    """Takes the mean over all devices of the axis "data"."""

    scale: Any

    def __call__(self, x: Any) -> Any:
        return (x - jax.lax.pmean(x.mean(axis=0, keepdims=True), "data")) * self.scale


def test_collectives_within_layers() -> None:
    net, x = (
        mw.Chain([Centred(jnp.linspace(1, 2, 8)), jnp.tanh]),
        jax.random.normal(jax.random.key(0), (4, 8)),
    )
    profile = mw.profile(net, x, repeats=1)
    assert mw.estimate(net, x, device="h100").activation_bytes == profile.activation_bytes == (128,) * 3
    schedule = mw.plan(profile, "1MiB")
    mesh, spec = jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()

    def mapped(step: Any) -> Any:
        specs = {"in_specs": (spec, spec), "out_specs": spec, "check_vma": False}
        return mw.jit(jax.shard_map(step, mesh=mesh, **specs))

    got = mapped(lambda net, x: jax.grad(lambda net: mean_square(mw.apply(schedule, net, x)))(net))(net, x)
    want = mapped(lambda net, x: jax.grad(lambda net: mean_square(net(x)))(net))(net, x)
    assert relative_error(got, want) < 1e-5


def test_ordered_callbacks_are_measured() -> None:
    def printed(x: Any) -> Any:
        jax.debug.print("{}", x[0, 0], ordered=True)
        return jnp.sin(x)

    profile = mw.profile(mw.Chain([jnp.tanh, printed]), jnp.ones((4, 8)), repeats=1)
    assert profile.layers[1].forward_ns >= 0


def test_planned_chains_within_a_layer_do_not_warn() -> None:
    inner = mw.Chain([jnp.tanh, jnp.sin])
    schedule = mw.Schedule(runs=alike(RunKind.STORE, "vjp", 2))
    net = mw.Chain([jnp.tanh, lambda x: mw.apply(schedule, inner, x)])
    assert len(mw.profile(net, jnp.ones((4, 8)), repeats=1)) == 2  # warnings are errors here


def test_what_is_differentiated_is_no_constant() -> None:
    schedule = mw.Schedule(runs=alike(RunKind.STORE, "vjp", 2))

    def loss(scale: Any, x: Any) -> Any:
        return mw.apply(schedule, mw.Chain([jnp.tanh, lambda x: x * scale]), x).sum()

    def given(scale: Any, x: Any) -> Any:
        times = jax.tree_util.Partial(jnp.multiply, scale)
        return mw.apply(schedule, mw.Chain([jnp.tanh, times]), x).sum()

    x = jnp.ones((4, 8))
    for argnums in (0, (0, 1)):
        with pytest.raises(mw.ChainError, match=r"closes over .*tree_util\.Partial"):
            jax.grad(loss, argnums)(jnp.float32(2), x)
    assert float(jax.grad(given)(jnp.float32(2), x)) == pytest.approx(32 * np.tanh(1), rel=1e-5)


def test_modules_are_not_hidden_in_functions() -> None:
    import equinox as eqx

    module = eqx.nn.Linear(8, 8, key=jax.random.key(0))
    for hiding in (jax.vmap(module), jax.jit(module), functools.partial(module), jax.checkpoint(module)):
        with pytest.raises(mw.ChainError, match=r"Linear whose weights are hidden.*eqx\.filter_vmap"):
            mw.Chain([hiding])
    assert len(mw.Chain([jax.jit(jnp.sin), jax.vmap(jnp.sort), functools.partial(jnp.sum, axis=0)])) == 3
    assert len(jax.tree.leaves(mw.Chain([eqx.filter_vmap(module)]))) == 2


@dataclass(frozen=True)
class Unscaled(rules.InvertRule):
    name: str = "unscaled"

    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        return y[0] / layer.scale, y[1]


@layer
class Biased:
    """Carries a mask of infinities, as attention adds it."""

    scale: Any

    def __call__(self, x: Any) -> Any:
        return x[0] * self.scale, x[1]

    def invert_rules(self, x: Any) -> list[Any]:
        return [Unscaled()]


def test_infinite_masks_leave_inverses_usable() -> None:
    mask = jnp.where(jnp.arange(8) % 2 == 0, -jnp.inf, 0.0)
    x = jax.random.normal(jax.random.key(0), (4, 8)), mask
    (option,) = mw.profile(mw.Chain([Biased(jnp.full(8, 1.5))]), x, repeats=1).layers[0].invert
    assert option.local_error < 1e-6
    assert option.growth < 2
    assert np.isfinite([option.sensitivity, option.gradient_sensitivity, option.kink]).all()


def test_sizes_want_units() -> None:
    for text in ("30", "1.5", "300_000"):
        with pytest.raises(mw.ArgumentError, match=r"has no unit.*MiB"):
            parse_bytes(text)
    assert parse_bytes("30B") == parse_bytes(30) == 30
    assert parse_bytes("300_000_000") == 300_000_000


def test_blocks_that_differ_in_names_are_equal() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flax's own, on import
        from flax import linen

        from mwplan.adapters.flax import from_linen

        x = jnp.ones((4, 8))
        blocks = [linen.Dense(8, name=f"Block_{i}") for i in range(5)]
        net = mw.Chain([from_linen(one, one.init(jax.random.key(i), x)) for i, one in enumerate(blocks)])
        assert len({jax.tree.structure(one) for one in net}) == 1
        assert len(mw.stack(net, x).parts) == 1
