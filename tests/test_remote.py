"""`mw.fit` for a device that is not here."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import targets
from mwplan.fitting import remote
from mwplan.layers import Dense, Sequential, Smooth
from tests.compilers import GPU
from tests.helpers import relative_error


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


LAYERS = 4
fit_function = sys.modules["mwplan.functions.fit_function"]  # `mw.fit_function` hides it


def make(key: Any) -> mw.Chain:
    def layer(key: Any) -> Sequential:
        one, two = jax.random.split(key)
        return Sequential((Dense.init(one, 64, 128), Smooth("gelu"), Dense.init(two, 128, 64)))

    return mw.Chain([layer(k) for k in jax.random.split(key, LAYERS)])


X, LABELS = jnp.ones((2048, 64)), jnp.zeros((2048, 64))


def loss(y: Any, labels: Any) -> Any:
    return jnp.mean((y - labels) ** 2)


def shapes() -> tuple[Any, ...]:
    return jax.eval_shape(lambda k: (make(k), X, LABELS), jax.random.key(0))


def here(name: str = "laptop") -> targets.Target:
    """This host's compiler, by figures that it need not have."""
    return dataclasses.replace(targets.attached(), name=name, device=targets.DEVICES["laptop"])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose compiler is this host's."""
    monkeypatch.setattr(remote, "target_of", lambda device: here())


def middle(profile: mw.Profile) -> int:
    """A budget between the least and the most."""
    points = mw.frontier(profile).points
    return (points[0][0] + 2 * points[-1][0]) // 3


@pytest.mark.usefixtures("pretended")
def test_the_fastest_that_fits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, labels = shapes()
    profile = mw.estimate(net, x, device="laptop")
    said: list[str] = []
    budget = middle(profile)
    fit = mw.fit(
        loss, net, x, labels, budget=budget, device="laptop", profile=profile, max_attempts=4, say=said.append
    )
    assert isinstance(fit, mw.RemoteFit)
    assert fit.fixed_bytes + fit.temporary_bytes <= budget
    assert len(said) == len(fit.attempts) <= 4
    fitting = [one for one in fit.attempts if one.compiled_bytes <= budget]
    assert fit.modelled_ns == min(one.modelled_ns for one in fitting)
    assert (fit.plain_bytes or 0) > fit.temporary_bytes
    assert fit.plain_ns
    assert fit.modelled_ns == pytest.approx(sum(ns for _, ns in fit.bounds), abs=1)
    for word in ("not attached", "backpropagation", "budget", "modelled"):
        assert word in str(fit)
    with pytest.raises(mw.TargetError, match="to_json"):
        fit.step(net, x)
    again = mw.RemoteFit.from_json(fit.to_json())
    assert again == fit
    # On the device: the step, within its budget, with the gradient of backpropagation.
    monkeypatch.setattr(remote, "attached", here)
    chain = make(jax.random.key(1))
    step = again.compile(loss, chain, X, LABELS)
    assert mw.temporaries(step) <= budget
    (value, _), grads = step(chain, X, LABELS)
    want, plain = jax.value_and_grad(lambda net: loss(net(X), LABELS))(chain)
    assert value == pytest.approx(want)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        assert jnp.allclose(one, other, atol=1e-5)


def fitted() -> mw.RemoteFit:
    """A plan as it might be loaded."""
    profile = mw.estimate(*shapes()[:2], device="laptop", compiled=False)
    return mw.RemoteFit(
        target="laptop",
        compiler=f"jax {jax.__version__}, jaxlib",
        schedule=dataclasses.replace(mw.plan(profile, budget="1GiB"), budget_bytes=1 << 30),
        arrangement=0,
        fixed_bytes=1,
        temporary_bytes=1,
        modelled_ns=1,
        bounds=(),
        plain_bytes=None,
        plain_ns=None,
        attempts=(),
    )


def test_plans_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, chain = fitted(), make(jax.random.key(1))
    assert "does not fit" in str(fit)
    with pytest.raises(mw.TargetError, match="laptop"):
        fit.compile(loss, chain, X, LABELS)
    monkeypatch.setattr(remote, "attached", here)
    with pytest.raises(mw.TargetError, match=r"jax 0\.1\.2"):
        dataclasses.replace(fit, compiler="jax 0.1.2, jaxlib").compile(loss, chain, X, LABELS)
    with pytest.raises(mw.ScheduleMismatchError, match="input"):
        fit.compile(loss, chain, X[:8], LABELS[:8])
    with pytest.raises(mw.ScheduleMismatchError, match="chain"):
        fit.compile(loss, mw.Chain([jnp.tanh] * LAYERS), X, LABELS)
    small = dataclasses.replace(fit, schedule=dataclasses.replace(fit.schedule, budget_bytes=1000))
    with pytest.raises(mw.TargetMemoryError) as caught:
        small.compile(loss, chain, X, LABELS)
    assert (caught.value.needed_bytes or 0) > 1000
    with pytest.raises(mw.FileFormatError):
        mw.RemoteFit.from_json(mw.estimate(*shapes()[:2], device="laptop", compiled=False).to_json())


@pytest.mark.usefixtures("pretended")
def test_bad_input() -> None:
    net, x, labels = shapes()
    with pytest.raises(mw.ArgumentError, match="tune"):
        mw.fit(loss, net, x, labels, budget="1GiB", device="laptop", tune=3)
    with pytest.raises(mw.InfeasibleError):
        mw.fit(
            loss, net, x, labels, budget="5KiB", device="laptop", profile=mw.estimate(net, x, device="laptop")
        )
    other = mw.estimate(mw.Chain([jnp.tanh]), x, device="laptop")
    with pytest.raises(mw.ScheduleMismatchError, match="another chain"):
        mw.fit(loss, net, x, labels, budget="1GiB", device="laptop", profile=other)


def residual(params: Any, x: Any, labels: Any) -> Any:
    """A model and loss of plain functions."""
    for up, down in params["blocks"]:
        x = x + jax.nn.gelu(x @ up) @ down
    return loss(x, labels)


def weights(key: Any) -> Any:
    keys = jax.random.split(key, 6)
    return {"blocks": [(0.1 * jax.random.normal(k, (64, 128)), jnp.ones((128, 64)) / 128) for k in keys]}


def test_a_function_for_a_device(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes; then, on the device, the step: within its budget, with the gradient of backpropagation."""
    monkeypatch.setattr(fit_function, "target_of", lambda device: here())
    params, x, labels = jax.eval_shape(lambda key: (weights(key), X, LABELS), jax.random.key(0))
    chain, given, back = mw.cut(residual, params, x, labels).build(params, x, labels)
    assert jax.tree.map(jnp.shape, given) == ((2048, 64),)
    assert back(chain, given)["blocks"][0][0].shape == (64, 128)
    budget = 10 << 20
    fit = mw.fit_function(residual, params, x, labels, budget=budget, device="laptop", max_attempts=2)
    assert isinstance(fit, mw.RemoteFunction)
    assert fit.fit.fixed_bytes + fit.temporary_bytes <= budget
    assert fit.temporary_bytes < (fit.fit.plain_bytes or 0)
    assert "pieces" in str(fit).splitlines()[0]
    with pytest.raises(mw.TargetError, match=r"fitted\.compile\(loss, params"):
        fit.step(params, x, labels)
    again = mw.RemoteFunction.from_json(fit.to_json())
    assert again == fit
    made = weights(jax.random.key(1))
    with pytest.raises(mw.TargetError, match="attached"):
        again.compile(residual, made, X, LABELS)
    monkeypatch.setattr(remote, "attached", here)
    (value, _), grads = again.compile(residual, made, X, LABELS)(made, X, LABELS)
    want, plain = jax.value_and_grad(residual)(made, X, LABELS)
    assert value == pytest.approx(want)
    assert relative_error(grads, plain) < 1e-5
    with pytest.raises(mw.ScheduleMismatchError):
        again.compile(residual, {"blocks": made["blocks"][:3]}, X, LABELS)


def test_a_function_for_a_device_is_not_timed_nor_traced() -> None:
    params = weights(jax.random.key(0))
    with pytest.raises(mw.ArgumentError, match="tune"):
        mw.fit_function(residual, params, X, LABELS, budget="1GiB", device="laptop", tune=3)
    with pytest.raises(mw.ArgumentError, match="device="):
        mw.fit_function(residual, jax.eval_shape(lambda: params), X, LABELS, budget="1GiB")


@GPU
def test_a_budget_on_a_gpu() -> None:
    """From shapes alone: nothing of the network's size is ever computed."""
    net, x, labels = shapes()
    profile = mw.estimate(net, x, device="h200", compiled=False)  # those priced: test_targets_pricing.py
    budget = middle(profile)
    fit = mw.fit(loss, net, x, labels, budget=budget, device="h200", profile=profile, max_attempts=3)
    assert isinstance(fit, mw.RemoteFit)
    assert fit.fixed_bytes + fit.temporary_bytes <= budget
    compiled = targets.compile(
        mw.value_and_grad(loss, fit.schedule, arrangement=fit.arrangement), net, x, labels, target="h200"
    )
    assert (compiled.temporary_bytes, compiled.modelled_ns) == (fit.temporary_bytes, fit.modelled_ns)
    with pytest.raises(mw.TargetError, match="h200"):
        fit.step(make(jax.random.key(0)), X, LABELS)
