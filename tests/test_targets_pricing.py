"""Profiles priced by a target's compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import targets
from mwplan.layers import Coupling, Dense, MaxMin, Sequential, Smooth
from mwplan.network import operations
from mwplan.network.rules import VjpStore
from mwplan.profiling import estimating
from mwplan.profiling.carrying import Place
from mwplan.profiling.options import Options
from mwplan.targets import plugins, program
from mwplan.targets.crossing import Crossing
from mwplan.targets.pricing import Compiler
from tests.compilers import GPU, TPU


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def here() -> targets.Target:
    """This host's compiler, with figures that it need not have."""
    return dataclasses.replace(targets.attached(), device=targets.DEVICES["laptop"])


def layer() -> Sequential:
    keys = jax.random.split(jax.random.key(0), 2)
    return Sequential((Dense.init(keys[0], 32, 128), Smooth("gelu"), Dense.init(keys[1], 128, 32)))


X = jnp.ones((1024, 32))


def test_workspaces_are_those_measured() -> None:
    """Bytes of every operation as `mw.profile` finds them, which compiles the same, and runs it."""
    net = mw.Chain([layer()])
    measured = mw.profile(net, X, repeats=1).layers[0]
    struct = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimating, "_pricing", lambda device, compiled: Compiler(here()))
        priced = mw.estimate(net, struct, device="laptop").layers[0]
    assert [o.name for o in priced.store] == [o.name for o in measured.store]
    for one, other in zip(priced.store, measured.store, strict=True):
        for field in dataclasses.fields(one):
            if field.name.endswith("_bytes"):
                got, want = getattr(one, field.name), getattr(other, field.name)
                assert got == pytest.approx(want, abs=X.nbytes), field.name
        assert one.residual_bytes == other.residual_bytes
        assert min(one.forward_ns, one.backward_ns) > 0


def test_equal_operations_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = program.built
    monkeypatch.setattr(program, "built", lambda *args: (built.append(1), original(*args))[1])
    told = []
    pricing = Compiler(here(), workers=2, progress=lambda done, started: told.append((done, started)))
    struct = jax.ShapeDtypeStruct(X.shape, X.dtype)
    first = [pricing.program(operations.plain_forward, layer(), struct) for _ in range(3)]
    assert len({one.time_ns for one in first}) == 1
    assert (len(built), told) == (1, [(1, 1)])
    # Another process would read it from disk.
    assert Compiler(here()).program(operations.plain_forward, layer(), struct).time_ns == first[0].time_ns
    assert len(built) == 1


def test_a_profile_by_this_hosts_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers side by side; the same plan from the second, which compiles nothing."""
    monkeypatch.setattr(estimating, "_pricing", lambda device, compiled: Compiler(here()))
    net = mw.Chain([layer(), MaxMin(), layer(), MaxMin()])
    shapes = jax.eval_shape(lambda n: n, net), jax.ShapeDtypeStruct(X.shape, X.dtype)
    seen = []
    profile = mw.estimate(*shapes, device="laptop", progress=lambda *told: seen.append(told[:2]))
    assert sorted(set(seen)) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "compiler of cpu" in profile.source
    assert profile.layers[0] == profile.layers[2]
    monkeypatch.setattr(program, "built", lambda *args: pytest.fail("compiled again"))
    assert mw.estimate(*shapes, device="laptop") == profile


def test_a_pause_between_passes_changes_no_value() -> None:
    """The programs that tell what a compiler keeps compute the gradients, whatever comes and goes."""
    one, struct = layer(), jax.ShapeDtypeStruct(X.shape, X.dtype)
    stored = Options(Compiler(here()), one, struct, Place()).stores[VjpStore()]
    forward, backward = stored.forward.alone, stored.backward.alone
    programs: list[Any] = []
    y, ct = stored.forward.result[0], backward.args[-1]
    Crossing(
        forward, backward, forward.inputs[-1], y, ct, (), lambda run, *given: programs.append((run, given))
    )
    values = [jnp.full(leaf.shape, 0.1, leaf.dtype) for leaf in programs[0][1][0]]
    found = [run(values, jnp.zeros((), jnp.int32)) for run, _ in programs]
    sums = [sorted(float(leaf) for leaf in some if leaf.shape == ()) for some in found]
    made, vjp = jax.vjp(
        lambda one, x: one(x), jax.tree.unflatten(jax.tree.structure(one), values[:-2]), values[-2]
    )
    want = sorted(float(leaf.sum()) for leaf in jax.tree.leaves(vjp(values[-1])))
    assert len(programs) == 4
    for some in sums:
        assert some == pytest.approx(want, rel=1e-4)
    assert made.shape == y.shape


def test_counting_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "missing", lambda device: "install `mwplan[targets]`")
    net, x = mw.Chain([MaxMin()]), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    profile = mw.estimate(net, x, device="h200")
    assert "roofline" in profile.source
    assert "mwplan[targets]" in profile.source
    plugins.place.cache_clear()
    with pytest.raises(mw.CompilerMissingError, match="mwplan"):
        mw.estimate(net, x, device="h200", compiled=True)


def check(name: str) -> mw.Profile:
    net = mw.Chain([layer(), MaxMin(), layer()])
    shapes = jax.eval_shape(lambda n: n, net), jax.ShapeDtypeStruct((8192, 32), jnp.float32)
    profile = mw.estimate(*shapes, device=name)
    assert f"compiler of {name}" in profile.source
    counted = mw.estimate(*shapes, device=name, compiled=False)
    assert "roofline" in counted.source
    for one, other in zip(profile.layers, counted.layers, strict=True):
        # What the compiler keeps need not be what the rules say, but is no more than those of a mask's bytes.
        assert [o.name for o in one.store] == [o.name for o in other.store]
        assert all(a.residual_bytes <= 8.1 * b.residual_bytes for a, b in zip(one.store, other.store))
        assert other.forward_ns / 5 < one.forward_ns < 5 * other.forward_ns
    return profile


@GPU
def test_a_profile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's compiled temporaries are what its plan says."""
    profile = check("h200")
    net = mw.Chain([layer(), MaxMin(), layer()])
    x = jax.ShapeDtypeStruct((8192, 32), jnp.float32)
    schedule = mw.plan(profile, budget="1GiB")

    def loss(y: Any) -> Any:
        return jnp.mean(y**2)

    compiled = targets.compile(mw.value_and_grad(loss, schedule), net, x, target="h200")
    assert 0.95 < compiled.temporary_bytes / schedule.peak_bytes < 1.02
    assert compiled.modelled_ns == pytest.approx(schedule.time_ns, rel=0.35)


@GPU
def test_halves_that_are_kept_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coupling needs one half of its input and the other of its output: together one activation a layer."""
    keys = jax.random.split(jax.random.key(0), 6)
    net = mw.Chain(
        [
            Coupling(*(Sequential((Dense.init(k, 64, 64), jnp.tanh)) for k in pair))
            for pair in keys.reshape(3, 2)
        ]
    )
    half = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    profile = mw.estimate(jax.eval_shape(lambda n: n, net), (half, half), device="h200")
    for option in profile.layers[1].store:
        kept = (
            option.residual_bytes + (option.keeps_input + option.keeps_output) * profile.activation_bytes[1]
        )
        assert kept >= 0.99 * profile.activation_bytes[1], option

    def loss(y: Any) -> Any:
        return jnp.mean((y[0] - y[1]) ** 2)

    for schedule in (mw.frontier(profile).at(budget) for budget in ("1GiB", "26MiB")):
        compiled = targets.compile(mw.value_and_grad(loss, schedule), net, (half, half), target="h200")
        assert 0.8 < compiled.temporary_bytes / schedule.peak_bytes < 1.02


@TPU
def test_a_profile_for_a_tpu() -> None:
    check("v5e")
