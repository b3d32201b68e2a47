"""Predicted errors of runs against measured ones, and what growth says about depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from experiments import growth as study
from mwplan import layers as ml
from mwplan.network import residuals, rules
from mwplan.plans.schedule import Run, RunKind, Strategy
from mwplan.profiling import growth

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


def relu_branch(key: Any) -> Any:
    first = ml.Dense(0.1 * jax.random.normal(key, (32, 32)), None)
    return ml.Sequential((ml.RMSNorm.init(None, 32), ml.ReLU(), first))


# Blocks, repeats, the shape of the input, and how far above the measured error the predicted one may be: far
# where kinks are rarely met.
INVERTED = {
    "leaky": (lambda k: [ml.Dense.init(k, 32, 32), ml.LeakyReLU(0.8)], 16, (8192, 32), 5),
    "smooth": (lambda k: [ml.Dense.init(k, 64, 64), ml.Smooth("gelu", 0.5)], 8, (64, 64), 3),
    "he": (lambda k: [ml.Dense.he(k, 64, 64, slope=0.8)], 3, (64, 64), 3),
    "coupling": (lambda k: [ml.Coupling(small_branch(k), small_branch(k))], 8, (64, 64), 3),
    "coupling-relu": (lambda k: [ml.Coupling(relu_branch(k), relu_branch(k))], 8, (512, 64), math.inf),
    "coupling-relu-bits": (lambda k: [ml.Coupling(relu_branch(k), relu_branch(k))], 8, (512, 64), 3),
    "maxmin": (lambda k: [ml.Sequential((ml.Dense.init(k, 64, 64), ml.MaxMin()))], 16, (512, 64), 3),
    "residual": (lambda k: [ml.Residual(small_branch(k))], 8, (64, 32), 3),
}


@pytest.mark.parametrize("name", INVERTED)
def test_inverse_prediction(name: str) -> None:
    """The predicted error of an INVERT run covers its gradients and the cotangent that leaves it, for white
    and for coherent cotangents."""
    block, repeats, shape, most = INVERTED[name]
    layers = [one for i in range(repeats) for one in block(K(100 + i))]
    x = jax.random.normal(K(1), shape)
    chosen, at = [], jax.eval_shape(lambda x: x, x)
    for one in layers:
        chosen.append(rules.invert_rules(one, at)[0 if name == "coupling-relu" else -1])
        at = jax.eval_shape(one, at)
    errors = growth.inverse_errors(layers, chosen, x, K(3))
    for ct in (None, jnp.ones(at.shape)):
        got = growth.follow_inverse(layers, chosen, x, ct, K(3), errors)
        worst = max(got.activation, got.worst_gradient, got.cotangent)
        assert worst / 4 < got.predicted < most * max(got.activation, got.gradient, got.cotangent)


def reversible(zeros: bool, activation: Any) -> mw.Chain:
    """A small RevNet; with `zeros`, half the channels of its stem begin as zeros, where norms are steep and
    ReLUs sit at their kink."""
    keys = iter(jax.random.split(K(0), 32))

    def branch() -> Any:
        last = ml.Dense(0.1 * jax.random.normal(next(keys), (16, 16)), None)
        return ml.Sequential((ml.RMSNorm.init(None, 16), activation, last))

    stem = ml.Dense.init(next(keys), 8, 32)
    if zeros:
        stem = ml.Dense(stem.weight * (jnp.arange(32) < 16), stem.bias)
    return mw.Chain(
        [stem, *[ml.Coupling(branch(), branch()) for _ in range(6)], ml.Dense.init(next(keys), 32, 4)]
    )


def squares(y: Any, labels: Any) -> Any:
    return jnp.mean((y - labels) ** 2)


def distance(got: Any, want: Any) -> float:
    """Of all gradients together, relative."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    size = sum(float(jnp.sum(b**2)) for _, b in pairs)
    return (sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs) / size) ** 0.5


@pytest.mark.parametrize("kind", ["zeros", "relu", "smooth"])
def test_inverted_gradients(kind: str) -> None:
    """A RevNet is inverted where its gradients allow it. Where they do not, the prediction, the planner and
    the run-time report all say so."""
    chain = reversible(kind == "zeros", ml.Smooth("gelu") if kind == "smooth" else ml.ReLU())
    x = jax.random.uniform(K(1), (256, 8))
    labels = jax.random.normal(K(2), (256, 4))
    profile = mw.estimate(chain, x, device="laptop", examples=256)
    ends = [Run(kind=RunKind.STORE, start=s, stop=s + 1, options=("vjp",)) for s in (0, 7)]

    def runs(option: str) -> tuple[Run, ...]:
        return ends[0], Run(kind=RunKind.INVERT, start=1, stop=7, options=(option,) * 6), ends[1]

    chosen = runs("subtract_bits" if kind == "relu" else "subtract")
    replayed = mw.replay(profile, chosen)
    leanest = mw.frontier(profile, allowed={Strategy.STORE, Strategy.INVERT})
    best = leanest.at(leanest.least_bytes or 0)
    if kind == "relu":  # a few flips in a step are enough
        assert 1e-4 < mw.replay(profile, runs("subtract")).error < 1e-2
        assert best.runs[1].options == ("subtract_bits",) * 6
    schedule = mw.Schedule(runs=chosen, report_scales=replayed.report_scales)

    (_, report), grads = mw.jit(mw.value_and_grad(squares, schedule))(chain, x, labels)
    error = distance(grads, mw.jit(jax.grad(lambda c: squares(c(x), labels)))(chain))
    assert replayed.error > error / 3
    assert float(report.worst) > error / 3
    if kind == "zeros":
        assert error > 1e-3
        assert best.strategies[1] is Strategy.STORE
    else:
        assert error < 1e-5
        assert max(replayed.error, float(report.worst)) < 1e-4
        assert best.strategies[1:7] == (Strategy.INVERT,) * 6


@pytest.mark.slow
def test_no_mask_flips() -> None:
    """A RevNet of 16 blocks of ReLUs and convolutions: some masks flip where they are rebuilt, none where
    they are kept for 1/32 of an activation a block."""

    def branch(key: Any) -> Any:
        one = ml.Conv2D.he(key, 32, 32)
        return ml.Sequential((ml.ReLU(), ml.Conv2D(0.7 * one.weight, one.bias)))

    def block(key: Any) -> Any:
        return ml.Coupling(*map(branch, jax.random.split(key)))

    stem, head = ml.Conv2D.he(K(0), 3, 64), ml.Dense.he(K(3), 16 * 16 * 64, 10)
    chain = mw.Chain([stem, mw.Stack.init(block, K(4), 16), ml.Flatten(3), head])
    x, labels = jax.random.normal(K(1), (8, 16, 16, 3)), jax.random.normal(K(2), (8, 10))
    want = mw.jit(jax.grad(lambda c: squares(c(x), labels)))(chain)
    ends = [Run(kind=RunKind.STORE, start=s, stop=s + 1, options=("vjp",)) for s in (0, 17, 18)]
    errors = {}
    for option in ("subtract", "subtract_bits"):
        inner = Run(kind=RunKind.INVERT, start=1, stop=17, options=(option,) * 16)
        schedule = mw.Schedule(runs=(ends[0], inner, *ends[1:]))
        _, grads = mw.jit(mw.value_and_grad(squares, schedule))(chain, x, labels)
        errors[option] = distance(grads, want)
    assert errors["subtract"] > 1e-4
    assert errors["subtract_bits"] < min(1e-4, errors["subtract"] / 10), errors

    one, at = chain.parts[1].layer(0, 0), jnp.zeros((8, 16, 16, 64))  # type: ignore[union-attr]
    y, kept = rules.invert_rules(one, at)[-1].forward(one, at)  # type: ignore[union-attr]
    assert 32 * residuals.new_bytes(residuals.split(kept, one, at, y)) == at.nbytes


def test_kinks() -> None:
    """ReLUs have a kink, their sensitivity apart from it is small; those that sit at it, as large as can be.
    Smooth layers have none, nor do kept masks."""
    x = jax.random.normal(K(2), (512, 64))

    def errors(one: Any, x: Any, which: int = 0) -> growth.InverseErrors:
        return growth.measure_inverse(one, rules.invert_rules(one, x)[which], x, K(3))

    slope = 0.6
    leaky = errors(ml.LeakyReLU(slope), x)
    # By noise of size h the sign of 2 phi(0) E|noise| / 2 = h / pi elements changes, each by 1 - slope of 1.
    share = (1 - slope) ** 2 / (1 + slope**2) * 2 / math.pi
    assert 0.3 * share < leaky.kink < 3 * share
    coupling = ml.Coupling(relu_branch(K(0)), relu_branch(K(1)))
    assert errors(coupling, x).sensitivity < 10
    assert errors(coupling, x).kink > 1e-2
    assert errors(coupling, x, -1).kink < 1e-5
    assert errors(coupling, x.at[:, 32:].set(0)).sensitivity > 1e3
    assert errors(ml.Smooth("gelu", 0.5), x).kink < 1e-5


def test_linear_layers_carry_no_error_on() -> None:
    """What a linear layer makes of a cotangent does not depend on its input; its gradient does,
    proportionally."""
    one = ml.Dense.init(K(0), 64, 64)
    x = jax.random.normal(K(1), (256, 64))
    got = growth.measure_inverse(one, rules.invert_rules(one, x)[0], x, K(2))
    assert got.sensitivity == 0
    assert 0.3 < got.gradient_sensitivity < 3
    none = growth.measure_inverse(ml.Permute((0,)), rules.invert_rules(ml.Permute((0,)), x)[0], x, K(2))
    np.testing.assert_allclose(none, (0, 1, 0, 0, 0), rtol=1e-6)


def test_steady_growth() -> None:
    np.testing.assert_allclose(growth.steady([1.1] * 8, 16), 1.1)
    np.testing.assert_allclose(growth.steady([280.0, 1.3, 1.3]), 140)
    assert growth.steady([1.0, np.inf]) == np.inf
    assert growth.steady([0.0, 0.0]) == 0
    rng = np.random.default_rng(0)
    for each in (1, 5):
        factors = rng.uniform(0.8, 3, 8)
        one, all_ = growth.steady(list(factors), each), np.repeat(factors, each)
        for i in range(len(all_)):
            for j in range(i + 1, len(all_) + 1):
                assert one ** (j - i) > 0.49 * np.prod(all_[i:j]) or (each > 1 and j - i < each)


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
    """A basis of other weights is still exact; it costs growth. Scaling it, as weight decay does, changes
    nothing."""
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


def subclasses(base: type) -> set[type]:
    return {found for one in base.__subclasses__() for found in (one, *subclasses(one))}


def test_the_study_of_the_library_is_of_the_whole_library() -> None:
    """`experiments.growth library` has a run of every rule that carries an error on, and of every inverse."""
    seen: set[type] = set()
    for family in study.families().values():
        at = jnp.zeros(family.shape)
        for one in family.block(K(0)):
            if family.inverse:
                seen |= {type(r) for r in rules.invert_rules(one, at)}
            else:
                chosen = study.options([one], at, family.option)[0]
                seen |= {type(chosen), type(getattr(chosen, "base", chosen))}
            at = jnp.zeros(jax.eval_shape(one, at).shape)
        assert at.shape == family.shape
    library = {
        c
        for c in subclasses(rules.VijpRule) | subclasses(rules.InvertRule)
        if "mwplan.layers" in c.__module__
    }
    # The first is abstract, the next two keep the whole cotangent, the last cuts zeros off: none makes an
    # error.
    exact = {"LinearRule", "WholeOf", "ReLUMask", "PadCut"}
    assert {c.__name__ for c in library - seen} <= exact


@pytest.mark.parametrize("name", ["Conv1D block 4", "Dense null", "Conv1D strided"])
def test_prediction_as_a_plan_sees_it(name: str) -> None:
    """From white cotangents and shared among layers that are alike, as in a profile."""
    got = study.one_run(name, study.families()[name], 8)
    assert 0.5 < got["ratio"] < (2 if got["growth"] < 3 else math.inf), got
