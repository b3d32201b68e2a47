"""Predicted errors of runs against measured ones, and what growth says about depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwplan import growth, rules
from mwplan import layers as ml

K = jax.random.key
STRUCT = jax.ShapeDtypeStruct


def options(layers: list[Any], x: Any, prefer: str | None) -> list[rules.VijpRule]:
    """Each layer's option `prefer`, or its first."""
    chosen = []
    for one in layers:
        own = [r for r in rules.vijp_rules(one, x) if isinstance(r, rules.VijpRule)]
        chosen.append(next((r for r in own if r.name == prefer), own[0]))
        x = jax.eval_shape(one, x)
    return chosen


@dataclass(frozen=True)
class Chain:
    """What a block of a homogeneous chain is made of, how often it repeats, and the shape of the input."""

    block: Callable[[Any], list[Any]]
    repeats: int
    shape: tuple[int, ...]
    option: str | None = None

    def follow(self) -> growth.Followed:
        layers = [one for i in range(self.repeats) for one in self.block(K(100 + i))]
        x = jax.random.normal(K(1), self.shape)
        return growth.follow(layers, options(layers, x, self.option), x, None, K(3))


def dense_he(key: Any) -> list[Any]:
    return [ml.Dense.he(key, 128, 128, slope=0.8), ml.LeakyReLU(0.8)]


def conv1d_he(key: Any) -> list[Any]:
    return [ml.Conv1D.he(key, 32, 32, slope=0.8).with_basis(STRUCT((32, 32), jnp.float32)), ml.LeakyReLU(0.8)]


def conv2d_he(key: Any) -> list[Any]:
    return [
        ml.Conv2D.he(key, 16, 16, slope=0.8).with_basis(STRUCT((8, 8, 16), jnp.float32)),
        ml.LeakyReLU(0.8),
    ]


def small_branch(key: Any) -> Any:
    return ml.Sequential((ml.Dense(0.03 * jax.random.normal(key, (32, 32)), None), ml.Smooth("tanh")))


def perturbed(key: Any) -> list[Any]:
    one = ml.Conv2D.init(key, 8, 8)
    return [ml.Conv2D(one.weight + 0.03 * jax.random.normal(key, one.weight.shape), one.bias), ml.MaxMin()]


CHAINS = {
    "leaky-0.5-depth-8": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.LeakyReLU(0.5)], 4, (64, 64)),
    "leaky-0.5-depth-64": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.LeakyReLU(0.5)], 32, (64, 64)),
    "leaky-0.3-depth-32": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.LeakyReLU(0.3)], 16, (64, 64)),
    "dense-maxmin": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.MaxMin()], 32, (64, 64)),
    "cayley-groupsort": Chain(lambda k: [ml.OrthogonalDense.init(k, 64, 64), ml.GroupSort(4)], 16, (64, 64)),
    "orthogonal-conv": Chain(lambda k: [ml.OrthogonalConv.init(k, 8, 8), ml.MaxMin()], 16, (4, 8, 8, 8)),
    "smooth": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.Smooth("gelu", 0.5)], 16, (64, 64)),
    "layernorm": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.LayerNorm.init(k, 64)], 32, (64, 64)),
    "rmsnorm": Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.RMSNorm.init(k, 64)], 16, (64, 64)),
    "delta-conv": Chain(lambda k: [ml.Conv2D.init(k, 8, 8), ml.LeakyReLU(0.8)], 16, (4, 8, 8, 8)),
    "perturbed-conv": Chain(perturbed, 8, (4, 8, 8, 8)),
    "valid-conv1d": Chain(
        lambda k: [ml.Conv1D.init(k, 16, 16, padding="VALID"), ml.LeakyReLU(0.7)], 4, (4, 24, 16)
    ),
    "coupling": Chain(
        lambda k: [ml.Coupling(small_branch(k), small_branch(k)), ml.Permute((0,))], 16, (64, 64)
    ),
    "residual": Chain(lambda k: [ml.Residual(small_branch(k))], 16, (64, 32), "fixed_16"),
    "dense-he-10%": Chain(dense_he, 16, (128, 128), "cokernel_10"),
    "dense-he-30%": Chain(dense_he, 16, (128, 128), "cokernel_30"),
    "conv1d-he-20%": Chain(conv1d_he, 8, (8, 32, 32), "cokernel_20"),
    "conv1d-he-30%": Chain(conv1d_he, 8, (8, 32, 32), "cokernel_30"),
    "conv2d-he-30%": Chain(conv2d_he, 8, (4, 8, 8, 16), "cokernel_30"),
}
WILD = {
    "dense-he": Chain(dense_he, 4, (128, 128)),
    "dense-he-2%": Chain(dense_he, 8, (128, 128), "cokernel_2"),
    "conv1d-he": Chain(conv1d_he, 4, (8, 32, 32)),
    "conv1d-he-block": Chain(conv1d_he, 4, (8, 32, 32), "block_4"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_prediction(name: str) -> None:
    """Where growth is below 3, predicted and measured errors of a run are within a factor of 2."""
    got = CHAINS[name].follow()
    assert max(got.growth) < 3
    predicted, measured = max(got.predicted), max(got.measured)
    assert 0.5 < predicted / measured < 2, (predicted, measured)


@pytest.mark.parametrize("name", WILD)
def test_wild(name: str) -> None:
    """Where growth is larger, the prediction is never below a tenth of what is measured."""
    got = WILD[name].follow()
    assert max(got.growth) > 3
    assert max(got.predicted) > max(got.measured) / 10


@pytest.mark.parametrize(
    "block",
    [
        lambda k: ml.Dense.init(k, 32, 32),
        lambda k: ml.OrthogonalDense.init(k, 32, 32, method="cayley"),
        lambda k: ml.OrthogonalDense.init(k, 32, 32, method="expm"),
        lambda k: ml.OrthogonalDense.init(k, 32, 32, method="householder"),
        lambda k: ml.MaxMin(),
        lambda k: ml.GroupSort(8),
        lambda k: ml.Permute((0,)),
    ],
)
def test_orthogonal_growth(block: Callable[[Any], Any]) -> None:
    one = block(K(0))
    x = jax.random.normal(K(1), (64, 32))
    local, factor = growth.measure(one, options([one], x, None)[0], x, K(2))
    assert local < 2e-6
    np.testing.assert_allclose(factor, 1, rtol=1e-5)


def test_unsafe_is_reported() -> None:
    """Slope 0.3 at 64 layers without fragments: predicted to lose every digit, and it does."""
    got = Chain(lambda k: [ml.Dense.init(k, 64, 64), ml.LeakyReLU(0.3)], 64, (64, 64)).follow()
    assert max(got.predicted) > 1
    assert max(got.measured) > 1


def test_deep_orthogonal_convolutions() -> None:
    """MaxMin with orthogonal convolutions, depth 512, float32, one run, no restart."""
    got = Chain(lambda k: [ml.OrthogonalConv.init(k, 6, 6), ml.MaxMin()], 512, (2, 6, 6, 6)).follow()
    assert got.worst_gradient < 1e-4
    np.testing.assert_allclose(got.growth, 1, rtol=1e-4)


def test_refinement() -> None:
    """One step of refinement lowers the local error of an ill-conditioned solve, and leaves growth alone."""
    one = ml.Dense.he(K(0), 128, 128)
    x = jax.random.normal(K(1), (64, 128))
    plain, refined = (growth.measure(one, r, x, K(2)) for r in options([one, one], x, None)[:1] * 2)
    rule = next(r for r in rules.vijp_rules(one, x) if r.name == "exact+refine")
    refined = growth.measure(one, rule, x, K(2))
    assert refined[0] < plain[0]
    np.testing.assert_allclose(refined[1], plain[1], rtol=1e-2)


def test_stale_basis() -> None:
    """A basis of other weights is still exact; it costs growth. Scaling it, as weight decay does, changes nothing."""
    one = ml.Dense.he(K(0), 128, 128)
    x = jax.random.normal(K(1), (64, 128))
    stale = ml.Dense(one.weight, one.bias, ml.Dense.he(K(5), 128, 128).basis)
    decayed = ml.Dense(one.weight, one.bias, 0.01 * one.basis)
    rule = next(r for r in rules.vijp_rules(one, x) if r.name == "cokernel_30")
    fresh, other, scaled = (growth.measure(layer, rule, x, K(2)) for layer in (one, stale, decayed))
    assert fresh[1] < 1.2 < other[1]
    assert other[0] < 1e-4
    np.testing.assert_allclose(scaled[1], fresh[1], rtol=1e-3)
    again = growth.measure(stale.refresh(), rule, x, K(2))
    np.testing.assert_allclose(again[1], fresh[1], rtol=1e-3)


def test_measure_is_repeatable() -> None:
    one = ml.Dense.he(K(0), 16, 16)
    x = jax.random.normal(K(1), (8, 16))
    for rule in options([one], x, None):
        assert growth.measure(one, rule, x, K(2)) == growth.measure(one, rule, x, K(2))
    assert growth.measure(one, rules.WholeFragment(), x, K(2)) == (0.0, 0.0)
    assert growth.measure(ml.Dense(jnp.zeros((4, 4))), options([one], x, None)[0], x[:, :4], K(0)) == (
        np.inf,
        np.inf,
    )


def test_predict() -> None:
    assert growth.predict([]) == []
    np.testing.assert_allclose(
        growth.predict([(3.0, 5.0), (0.0, 2.0), (8.0, 1.0), (0.0, 0.0)]), [3, 6, 10, 0]
    )
    assert growth.predict([(1.0, 1.0), (1.0, 1e200), (1.0, 1e200)])[-1] == np.inf
