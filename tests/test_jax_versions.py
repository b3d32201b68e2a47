"""What the package expects of JAX, whatever its version: options that do not undo each other, barriers that
hold, and plans that are right under the switches with which newer versions are tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.compilers.compiling import options_of

ROOT = Path(__file__).parent.parent
SWITCHES = ("jax_remat3", "jax_custom_vjp3", "jax_scan3")

#: A planned step of every strategy, beside plain differentiation: written out, in loops, and recomputed.
STEP = """
import jax, jax.numpy as jnp, mwplan as mw
from mwplan.layers import Coupling, Dense, MaxMin, OrthogonalDense, Smooth
from tests.helpers import alike, relative_error
from mwplan.plans.schedule import RunKind

for name in {switches}:
    jax.config.update(name, True)
keys = iter(jax.random.split(jax.random.key(0), 8))
block = lambda: Coupling(OrthogonalDense.init(next(keys), 8, 8), Smooth("gelu"))
x = jax.random.normal(next(keys), (4, 16))
loss = lambda y: jnp.mean(y**2)
chain = mw.Chain([block() for _ in range(4)])
want = jax.grad(lambda chain: loss(chain(x)))(chain)
options = {{"store": "vjp", "recompute": "vjp", "invert": None, "moonwalk": None}}
profile = mw.estimate(chain, x, device="h100")
for kind in RunKind:
    layer = profile.layers[0]
    offered = {{"store": layer.store, "recompute": layer.store, "invert": layer.invert,
               "moonwalk": layer.moonwalk}}.get(kind.value, ())
    if not offered:
        continue
    schedule = mw.Schedule(runs=alike(kind, offered[0].name, 4))
    for net in (chain, mw.stack(chain, x)):
        step = mw.jit(mw.value_and_grad(loss, schedule))
        got = step(net, x)[1]
        error = relative_error(jax.tree.leaves(mw.unstack(got)), jax.tree.leaves(want))
        assert error < 1e-4, (kind, type(net.parts[0]), error)
        print(kind.value, error)
"""


@pytest.mark.parametrize("switches", [*((name,) for name in SWITCHES), SWITCHES], ids="+".join)
def test_plans_are_right_under_the_switches_of_newer_versions(switches: tuple[str, ...]) -> None:
    there = tuple(name for name in switches if hasattr(jax.config, name))
    if not there:
        pytest.skip(f"jax {jax.__version__} has none of {', '.join(switches)}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", STEP.format(switches=there)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kinds = {line.split()[0] for line in run.stdout.splitlines()}
    assert kinds >= {"store", "recompute", "invert", "moonwalk"}


def _recomputed_bytes(passes: bool | None, options: dict[str, str]) -> int:
    """Temporaries of 16 layers of which each is recomputed; `passes`, JAX's own rematerialization pass."""
    x, weights = jnp.ones((1024, 64)), [jnp.eye(64)] * 16

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in weights:
            x = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(jnp.sin(x @ w))))(w, x)
        return jnp.sum(x)

    before = jax.config.jax_compiler_enable_remat_pass
    jax.config.update("jax_compiler_enable_remat_pass", before if passes is None else passes)
    try:
        lowered = jax.jit(jax.grad(loss)).lower(weights, x)
        return mw.temporaries(lowered.compile(compiler_options=options or None))
    finally:
        jax.config.update("jax_compiler_enable_remat_pass", before)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for XLA:CPU")
def test_options_hold_beside_jax_s_own() -> None:
    """Both disable passes of XLA, and one list of these once overwrote the other: what is recomputed stays
    recomputed with JAX's pass on and off."""
    activation = 4 * 1024 * 64
    planned = {passes: _recomputed_bytes(passes, options_of("cpu")) for passes in (None, True, False)}
    assert max(planned.values()) <= min(planned.values()) * 1.02
    assert max(planned.values()) < 22 * activation  # three more a layer would be 48 and more


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the option is for XLA:CPU")
def test_the_option_is_needed_or_does_no_harm() -> None:
    """With the options a recomputing program never takes more than without."""
    assert _recomputed_bytes(None, options_of("cpu")) <= _recomputed_bytes(None, {}) * 1.02
