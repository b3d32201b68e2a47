"""What compiled steps say of arguments that they were not compiled for, and what plans say of
backpropagation."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import mwplan as mw
from mwplan.app import cli
from mwplan.common import platforms
from mwplan.common.sizes import show_bytes
from mwplan.profiling import touch
from mwplan.solvers import baselines
from mwplan.solvers.problem import Problem
from tests.chains import random_profile

WIDTH, BATCH = 16, 32


def network(depth: int = 4) -> mw.Chain:
    keys = jax.random.split(jax.random.key(0), depth)
    return mw.Chain([f for k in keys for f in (mw.layers.Dense.init(k, WIDTH, WIDTH), jnp.tanh)])


def mean_square(y: Any, target: Any) -> Any:
    return jnp.mean((y - target) ** 2)


@pytest.fixture(scope="module")
def fitted() -> Any:
    net, x = network(), jnp.ones((BATCH, WIDTH))
    profile = mw.estimate(net, x, device="h100", compiled=False)
    return mw.fit(mean_square, net, x, x, budget="1MiB", profile=profile)


SHORT = jnp.ones((BATCH - 5, WIDTH))
FULL = jnp.ones((BATCH, WIDTH))
WRONG = {
    "last batch": (lambda: (network(), SHORT, SHORT), r"`x` is float32\[27, 16\].*float32\[32, 16\].*pad"),
    "labels": (lambda: (network(), FULL, SHORT), r"`args\[0\]` is float32\[27, 16\].*float32\[32, 16\]"),
    "dtype": (lambda: (network(), FULL.astype(jnp.bfloat16), FULL), r"`x` is bfloat16\[32, 16\]"),
    "structure": (
        lambda: (network(), {"x": FULL}, FULL),
        r"`x` has another structure .* lacks `x` and it has `x\['x'\]` besides",
    ),
    "shorter chain": (lambda: (network(3), FULL, FULL), r"`chain` has another structure .* it lacks `chain"),
    "missing": (lambda: (network(), FULL), r"takes 3 arguments and got 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_says_what_does_not_fit(fitted: Any, what: str) -> None:
    args, message = WRONG[what]
    with pytest.raises(mw.ArgumentError, match=message):
        fitted.step(*args())


def test_a_step_is_jaxs_compiled_program(fitted: Any) -> None:
    assert mw.temporaries(fitted.step) == fitted.temporary_bytes
    with pytest.raises(TypeError, match="transformations"):  # JAX's own words stay
        jax.grad(lambda x: fitted.step(network(), x, FULL)[0][0])(FULL)


def test_memory_elsewhere_is_pooled() -> None:
    """What a first touch costs is asked of the platform that programs are written for."""
    with platforms.lowering_for("gpu"):
        assert touch.measured() == touch.FirstTouch()


def _states(optimizer: Any, params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer.init(params)) if hasattr(leaf, "nbytes"))


def test_a_budget_holds_the_optimizers_state() -> None:
    optax = pytest.importorskip("optax")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    net = network()
    profile = mw.estimate(net, FULL, device="h100", compiled=False)
    plain = mw.fit(mean_square, net, FULL, FULL, budget="1MiB", profile=profile)
    state = _states(optimizer, jax.tree.leaves(net))
    assert state > 8 * WIDTH * WIDTH * 4
    held = mw.fit(mean_square, net, FULL, FULL, budget="1MiB", profile=profile, optimizer=optimizer)
    assert held.schedule.fixed_bytes == plain.schedule.fixed_bytes + state
    assert "optimizer's state" in str(held)
    tight = plain.schedule.fixed_bytes + plain.temporary_bytes
    mw.fit(mean_square, net, FULL, FULL, budget=tight, profile=profile)
    with pytest.raises(mw.InfeasibleError):
        mw.fit(
            mean_square, net, FULL, FULL, budget=tight, profile=profile, optimizer=optimizer, max_attempts=1
        )
    with pytest.raises(mw.ArgumentError, match=r"optax\.GradientTransformation"):
        mw.fit(mean_square, net, FULL, FULL, budget="1MiB", optimizer="adam")


def test_a_functions_budget_holds_the_optimizers_state() -> None:
    optax = pytest.importorskip("optax")
    params = {"a": jnp.eye(WIDTH), "steps": jnp.zeros((), jnp.int32), "name": "own"}

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"]) ** 2)

    held = mw.fit_function(loss, params, FULL, budget="1MiB", optimizer=optax.adam(1e-3))
    state = _states(optax.adam(1e-3), {"a": params["a"]})
    assert held.profile.optimizer_bytes == state
    assert held.profile.fixed_bytes >= 2 * params["a"].nbytes + state
    assert "optimizer's state" in str(held)


def test_a_function_says_which_argument_is_other() -> None:
    """A forgotten one, another name, what `jax.jit` made an array of; never a whole tree."""

    def loss(params: Any, x: Any, key: Any) -> Any:
        noise = jax.random.normal(key, x.shape)
        return jnp.mean(jnp.tanh((x + params["rate"] * noise) @ params["a"]) ** 2)

    x, key = jnp.ones((128, 64)), jax.random.key(0)
    params = {"a": jnp.eye(64), "rate": 0.1, "mode": "train"}
    fitted = mw.fit_function(loss, params, x, key, budget="1GiB")
    assert isinstance(fitted, mw.FittedFunction)
    with pytest.raises(mw.ArgumentError, match=r"2 arguments were given, .* for 3, `params` and 2 more"):
        fitted.step(params, x)
    other = r"lacks `params\['a'\]` and it has `params\['b'\]` besides"
    with pytest.raises(mw.ArgumentError, match=other):
        fitted.step({"b": params["a"], "rate": 0.1, "mode": "train"}, x, key)
    arrays = {"a": params["a"], "rate": params["rate"]}
    with pytest.raises(
        mw.ArgumentError, match=r"`params\['rate'\]` is 0\.1, part of the program.*filter_jit"
    ):
        mw.jit(lambda some: fitted.value_and_grad({**some, "mode": "train"}, x, key))(arrays)


def test_what_backpropagation_would_take_is_said() -> None:
    """As the ledger has it, where every layer is stored; in the profile, the plan, and their prints."""
    for seed in range(30):
        profile = random_profile(random.Random(seed), 5)
        stored = baselines.store_all(Problem(profile=profile))
        assert profile.stored_bytes == stored.peak_bytes + profile.beside_bytes
    net = network()
    profile = mw.estimate(net, FULL, device="h100", compiled=False)
    plan = mw.plan(profile, "1MiB")
    assert plan.stored_bytes == profile.stored_bytes
    said = f"{show_bytes(profile.stored_bytes)} temporaries"
    assert said in str(profile)
    assert said in str(plan)
    assert mw.Schedule.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("command", ["plan", "profile", "frontier"])
def test_the_command_line_says_what_backpropagation_would_take(command: str, tmp_path: Any) -> None:
    profile = mw.estimate(network(), FULL, device="h100", compiled=False)
    saved = tmp_path / "profile.json"
    saved.write_text(profile.to_json())
    more = {"plan": ["--budget", "1MiB"], "profile": ["--to", str(tmp_path / "again.json")], "frontier": []}
    result = CliRunner().invoke(cli.app, [command, str(saved), *more[command]])
    assert result.exit_code == 0, result.output
    assert f"{show_bytes(profile.stored_bytes)} temporaries" in result.output
