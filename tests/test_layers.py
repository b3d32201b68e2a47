"""Every layer and option against `jax.vjp`: one table, crossed with every check. A new layer is a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwplan import layers as ml
from mwplan import rules, trees

K = jax.random.key


def jiggle(layer: Any, scale: float = 0.02, seed: int = 9) -> Any:
    """`layer` with its parameters moved a little: well-conditioned, not special. Bases stay."""
    params = trees.parameters(layer)
    keys = jax.random.split(K(seed), len(params) + 1)
    return trees.with_parameters(
        layer, [p + scale * jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, params)]
    )


def causal(layer: Any) -> Any:
    """`layer` with its strongest tap first, as the block recursion wants it."""
    return dataclasses.replace(layer, weight=jnp.roll(layer.weight, -((layer.weight.shape[0] - 1) // 2), 0))


@dataclass(frozen=True)
class Row:
    """A layer to make, the trailing shape of its input, and the option names it must have."""

    make: Callable[[], Any]
    shape: tuple[int, ...]
    options: tuple[str, ...]


def branch(seed: int, size: int, scale: float = 1.0) -> Any:
    a, b = jax.random.split(K(seed))
    first = ml.Dense(scale * jax.random.normal(a, (size, size)), jnp.zeros(size))
    return ml.Sequential((first, ml.Smooth("tanh"), ml.Dense(jax.random.normal(b, (size, size)), None)))


def he_conv(cls: Any, shape: tuple[int, ...], *args: Any, **kw: Any) -> Any:
    return cls.he(K(1), *args, **kw).with_basis(jax.ShapeDtypeStruct(shape, jnp.float32))


ROWS = {
    "dense": Row(lambda: jiggle(ml.Dense.init(K(1), 6, 6)), (6,), ("exact", "exact+refine")),
    "dense-tall": Row(lambda: jiggle(ml.Dense.init(K(1), 7, 4)), (7,), ("exact", "exact+refine")),
    "dense-wide": Row(lambda: jiggle(ml.Dense.init(K(1), 4, 7)), (4,), ("null",)),
    "dense-he": Row(
        lambda: ml.Dense.he(K(1), 16, 16), (16,), tuple(f"cokernel_{p}" for p in (2, 5, 10, 20, 30, 50))
    ),
    "dense-he-wide": Row(lambda: ml.Dense.he(K(1), 8, 11), (8,), ("null", "cokernel_30", "cokernel_50")),
    "conv1d-same": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4)), (9, 4), ("halo", "halo+refine")),
    "conv1d-valid": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID")), (9, 4), ("spectral",)
    ),
    "conv1d-circular": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR")), (7, 4), ("spectral",)
    ),
    "conv1d-dilated": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2)), (11, 4), ("halo",)),
    "conv1d-groups": Row(lambda: jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2)), (8, 6), ("halo",)),
    "conv1d-explicit": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),))), (8, 4), ("halo",)),
    "conv1d-s2-double": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 3, 6, 4, stride=2, padding=1)), (10, 3), ("halo",)
    ),
    "conv1d-s3-dilated": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, 3, stride=3, dilation=2)), (13, 4), ("halo",)
    ),
    "conv1d-he": Row(
        lambda: he_conv(ml.Conv1D, (12, 6), 6, 6), (12, 6), tuple(f"cokernel_{p}" for p in (10, 20, 30, 50))
    ),
    "conv1d-he-wide": Row(lambda: he_conv(ml.Conv1D, (12, 4), 4, 7), (12, 4), ("cokernel_50",)),
    "block-same": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4))), (9, 4), ("block_4", "block_8", "block_16")
    ),
    "block-k4": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID"))),
        (12, 4),
        ("block_4", "block_8"),
    ),
    "block-circular": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR"))), (10, 4), ("block_4",)
    ),
    "block-dilated": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2))), (11, 4), ("block_8",)
    ),
    "block-groups": Row(lambda: causal(jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2))), (8, 6), ("block_4",)),
    "block-explicit": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),)))), (8, 4), ("block_4",)
    ),
    "conv2d-same": Row(lambda: jiggle(ml.Conv2D.init(K(1), 3, 3)), (6, 5, 3), ("halo",)),
    "conv2d-1x1": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 4, 3, 1)),
        (3, 4, 4),
        ("pointwise", "pointwise+refine", "spectral"),
    ),
    "conv2d-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 3, stride=2, padding=1)), (7, 6, 3), ("pointwise", "halo")
    ),
    "conv2d-s2-double": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 6, stride=2, padding=1)), (6, 8, 3), ("halo",)
    ),
    "conv2d-k4s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 5, 4, stride=2, padding="VALID")), (9, 8, 2), ("spectral",)
    ),
    "conv2d-mixed": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 2, (3, 5), stride=(1, 3), padding=((1, 2), (0, 2)))),
        (6, 9, 2),
        ("halo",),
    ),
    "conv2d-circular-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 4, 3, stride=2, padding="CIRCULAR", groups=2)),
        (6, 8, 2),
        ("spectral",),
    ),
    "conv2d-he": Row(lambda: he_conv(ml.Conv2D, (6, 6, 4), 4, 4), (6, 6, 4), ("cokernel_20", "cokernel_50")),
    "conv2d-he-groups": Row(
        lambda: he_conv(ml.Conv2D, (6, 4, 4), 4, 4, groups=2, padding="CIRCULAR"),
        (6, 4, 4),
        ("cokernel_30", "cokernel_50"),
    ),
    "leaky": Row(lambda: ml.LeakyReLU(0.3), (5,), ("divide",)),
    "maxmin": Row(lambda: ml.MaxMin(), (3, 6), ("undo",)),
    "groupsort": Row(lambda: ml.GroupSort(3), (2, 6), ("undo",)),
    "groupsort-16": Row(lambda: ml.GroupSort(16), (32,), ("undo",)),
    "relu": Row(lambda: ml.ReLU(), (5,), ("whole",)),
    "average": Row(lambda: ml.AveragePool((2, 3)), (5, 6, 2), ("sum",)),
    "max": Row(lambda: ml.MaxPool((2, 2)), (5, 6, 3), ("read",)),
    "max-1d": Row(lambda: ml.MaxPool((5,)), (11, 2), ("read",)),
    "flatten": Row(lambda: ml.Flatten(2), (3, 4), ("move",)),
    "reshape": Row(lambda: ml.Reshape((3, 4), (2, 6)), (3, 4), ("move",)),
    "permute": Row(lambda: ml.Permute((2, 0, 1)), (2, 3, 4), ("move",)),
    "space-to-depth": Row(lambda: ml.SpaceToDepth((2, 3)), (4, 6, 2), ("move",)),
    "pad-channels": Row(lambda: ml.PadChannels(2), (3, 4), ("padded",)),
    "orthogonal": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 6), (6,), ("jvp",)),
    "orthogonal-tall": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 4, method="expm"), (6,), ("jvp",)),
    "orthogonal-wide": Row(
        lambda: ml.OrthogonalDense.init(K(1), 4, 6, method="householder"), (4,), ("null",)
    ),
    "orthogonal-conv1d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 3, dims=1), (7, 4), ("jvp",)),
    "orthogonal-conv2d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 4), (6, 5, 4), ("jvp",)),
    "smooth-gelu": Row(lambda: ml.Smooth("gelu", 0.3), (5,), ("divide", "whole_input")),
    "smooth-softplus": Row(lambda: ml.Smooth("softplus", 0.2), (5,), ("divide", "whole_input")),
    "gelu": Row(lambda: ml.Smooth("gelu"), (5,), ("whole_input",)),
    "tanh": Row(lambda: ml.Smooth("tanh"), (5,), ("whole_input",)),
    "layernorm": Row(lambda: jiggle(ml.LayerNorm.init(None, 7), 0.2), (7,), ("moments",)),
    "rmsnorm": Row(lambda: jiggle(ml.RMSNorm.init(None, 7), 0.2), (7,), ("moments",)),
    "coupling": Row(lambda: ml.Coupling(branch(1, 4), branch(2, 4)), (8,), ("subtract", "subtract_vjps")),
    "residual": Row(lambda: ml.Residual(branch(1, 4, 0.03)), (4,), ("fixed_16", "fixed_32")),
    "sequential": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Dense.init(K(1), 6, 6)), ml.LeakyReLU(0.5), ml.Dense.he(K(2), 6, 6), ml.ReLU())
        ),
        (6,),
        ("parts", "parts.cokernel_50"),
    ),
    "sequential-conv": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Conv2D.init(K(1), 4, 4)), ml.MaxMin(), ml.MaxPool((2, 2)), ml.Flatten(3))
        ),
        (5, 4, 4),
        ("parts",),
    ),
}
OPTIONS = [(name, option) for name, row in ROWS.items() for option in row.options]


def find(layer: Any, x: Any, option: str) -> rules.VijpRule:
    for rule in rules.vijp_rules(layer, x):
        if rule.name == option:
            assert isinstance(rule, rules.VijpRule), rule
            return rule
    raise AssertionError(f"no option {option}: {rules.vijp_rules(layer, x)}")


def wide(layer: Any) -> Any:
    return trees.with_parameters(layer, [p.astype(jnp.float64) for p in trees.parameters(layer)])


@partial(jax.jit, static_argnums=1)
def recovery(layer: Any, rule: rules.VijpRule, x: Any, ct_out: Any) -> Any:
    """Relative distances of `reverse` from `jax.vjp` and of the rebuilt cotangent from the true one."""
    _, q = rule.forward(layer, x)
    ct_in, fragment = rule.reverse(layer, q, ct_out)
    _, vjp = jax.vjp(layer, x)
    rebuilt = rule.rebuild(layer, x, ct_in, fragment)
    pairs = ((ct_in, vjp(ct_out)[0]), (rebuilt, ct_out))
    return jnp.stack([jnp.linalg.norm(got - want) / jnp.linalg.norm(want) for got, want in pairs])


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_recovery(name: str, option: str) -> None:
    row = ROWS[name]
    layer = row.make()
    x = jax.random.normal(K(2), (2, 3, *row.shape))
    ct_out = jax.random.normal(K(3), jax.eval_shape(layer, x).shape)
    rule = find(layer, x, option)
    assert rule.check(layer, trees.struct(x)) is None
    assert recovery(layer, rule, x, ct_out).max() < 1e-4
    with jax.enable_x64(True):
        layer, x, ct_out = wide(layer), x.astype(jnp.float64), ct_out.astype(jnp.float64)
        errors = np.asarray(recovery(layer, rule, x, ct_out))
    assert (errors < 1e-10).all(), errors
