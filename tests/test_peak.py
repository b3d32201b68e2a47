"""What is alive at the peak of compiled steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import targets
from mwplan.layers import Dense, LeakyReLU
from mwplan.targets import reports
from tests.compilers import GPU, TPU

WIDTH, ROWS = 256, 2048
SIZE = 4 * WIDTH * ROWS
W = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 5
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def plain(weights: Any, x: Any) -> Any:
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


STEP = jax.value_and_grad(plain)


def check_plain(target: str | None) -> None:
    """Backpropagation keeps one output of each of five layers; nothing is padded or copied."""
    peak = mw.explain_peak(STEP, W, X, target=target)
    compiled = targets.compile(STEP, W, X, target=target, cached=False)
    assert peak.exact
    assert peak.temporary_bytes == compiled.temporary_bytes
    assert 0 <= peak.fragmentation_bytes < 0.3 * peak.temporary_bytes
    kept = [one for one in peak.buffers if one.role == "kept for the backward pass"]
    assert {one.type for one in kept} == {f"f32[{ROWS},{WIDTH}]"}
    assert 4 <= len(kept) <= 6
    assert all(("tanh" in one.scope or "dot" in one.scope) and one.sweep == "forward" for one in kept)
    assert sum(peak.by_role().values()) == pytest.approx(peak.alive_bytes, rel=0.01)
    text = str(peak)
    assert "kept for the backward pass" in text
    assert "fragmentation" in text
    again = mw.explain_peak(compiled)
    assert not again.exact
    assert again.alive_bytes == pytest.approx(peak.alive_bytes, abs=2 * SIZE)
    assert "order of its instructions" in str(again)


def test_backpropagation_here() -> None:
    check_plain(None)


@GPU
def test_backpropagation_on_a_gpu() -> None:
    check_plain("h200")


@TPU
def test_padding_on_a_tpu() -> None:
    """Of an array of 3 x 3 columns some are rounded up."""
    narrow = jax.ShapeDtypeStruct((1 << 22, 3, 3), jnp.float32)

    def program(x: Any) -> Any:
        y = jnp.sort(jnp.cumsum(x, axis=0), axis=1)
        return jnp.sin(y @ jnp.ones((3, 3))) @ y

    peak = mw.explain_peak(program, narrow, target="v5e")
    assert peak.temporary_bytes > 16 << 30  # it does not fit: the peak says why
    assert any("padded" in word for one in peak.buffers for word in one.surprises)
    assert "padded" in str(peak)


@GPU
def test_a_workspace_and_a_copy_are_named() -> None:
    def program(x: Any) -> Any:
        return jnp.sort(jnp.swapaxes(x, 0, 1) * 2.0, axis=0)

    peak = mw.explain_peak(jax.jit(program), jax.ShapeDtypeStruct((1 << 20, 4), jnp.float32), target="h200")
    assert peak.temporary_bytes > 0
    assert peak.buffers


def test_a_plan_names_sweeps_and_layers() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    net = mw.Chain([f for key in keys for f in (Dense.init(key, 64, 64), LeakyReLU(0.5))])
    x = jnp.ones((512, 64))
    shapes = jax.eval_shape(lambda *given: given, net, x)  # no errors are measured
    profile = mw.estimate(*shapes, device="laptop")
    schedule = mw.plan(profile, budget="1GiB")
    step = mw.value_and_grad(lambda y: jnp.mean(y**2), schedule)
    peak = mw.explain_peak(step, net, x, schedule=schedule)
    assert peak.expected_bytes == schedule.peak_bytes
    assert peak.alive_bytes == pytest.approx(schedule.peak_bytes, rel=0.2)
    sweeps = {one.sweep for one in peak.buffers}
    assert any(sweep.startswith("forward ") and int(sweep.split()[1]) <= len(net) for sweep in sweeps)
    assert "the ledger expects" in str(peak)
    jitted = mw.jit(step).lower(net, x).compile()
    assert mw.explain_peak(jitted).buffers


ASSIGNED = """BufferAssignment:
allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
 value: <1 x @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 192, preallocated-temp:
 value: <2 a @0> (size=64,offset=0): f32[16]{0}
 value: <3 b{0} @0> (size=64,offset=64): f32[16]{0}
 value: <4 c @0> (size=64,offset=0): f32[16]{0}
 value: <5 d @0> (size=64,offset=128): f32[16]{0}
allocation 2: size 999, color 1, preallocated-temp:
 value: <6 v @1> (size=999,offset=0): f32[16]{0}
"""
RANGES = """HloLiveRange (max 5):
  InstructionSequence:
    0:x
    1:a
    2:b
    3:c
    4:d
  BufferLiveRange:
    a{}:1-3
    b{0}:2-4
    c{}:3-4
    d{}:4-4
    v{}:1-4
"""
TEXT = """ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %d = f32[16]{0} negate(%x)
}
"""


def test_reports() -> None:
    """What is written over another counts once; other memories do not count."""
    lives = reports.from_reports(ASSIGNED, RANGES, TEXT)
    assert lives is not None
    assert lives.total_bytes == 192
    moment, alive = lives.at_peak()
    assert (moment, sum(one.nbytes for one in alive)) == (4, 192)
    assert reports.from_reports(ASSIGNED, "nothing", TEXT) is None


def test_bad_input() -> None:
    with pytest.raises(mw.ArgumentError, match="compiled program"):
        mw.explain_peak(3)
    with pytest.raises(mw.ArgumentError, match="compiled program"):
        mw.explain_peak(plain)
