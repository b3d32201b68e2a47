"""Barriers: which a step has on which platform, that gradients are the same under all, and what they cost
where a GPU's compiler is installed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

import mwplan as mw
from experiments.barriers import POLICIES, maxmin
from mwplan import targets
from mwplan.common import platforms
from mwplan.compilers import compiling
from mwplan.execution import barriers
from mwplan.execution.barriers import Barriers
from mwplan.plans.schedule import Run, RunKind, Schedule
from tests.compilers import GPU
from tests.helpers import alike, mean_square, mlp, relative_error

DEPTH = 4
#: Dense layers and leaky ReLU, some by each strategy that they have.
STORED = alike(RunKind.STORE, "vjp", 2)
VIJPS = Run(kind=RunKind.MOONWALK, start=2, stop=4, options=("exact", "divide"))
AGAIN = Run(
    kind=RunKind.RECOMPUTE,
    start=4,
    stop=6,
    inner=tuple(Run(kind=RunKind.STORE, start=at, stop=at + 1, options=("vjp",)) for at in (4, 5)),
)
INVERTED = Run(kind=RunKind.INVERT, start=7, stop=8, options=("divide",))
LAST = Run(kind=RunKind.STORE, start=6, stop=7, options=("vjp",))


def network() -> tuple[mw.Chain, Any, Schedule]:
    """A chain, its input, and a schedule of all strategies."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    return mlp(DEPTH), x, Schedule(runs=(*STORED, VIJPS, AGAIN, LAST, INVERTED))


def count(step: Any, *args: Any) -> int:
    """The barriers in a step."""
    return traced(step, *args).count("optimization_barrier")


def traced(step: Any, *args: Any) -> str:
    """The program of a step, before any compiler has seen it."""
    with compiling.options_given():
        return str(jax.make_jaxpr(step)(*args))


def test_platforms_have_their_own() -> None:
    """Those of the platform that a program is written for, not of the one that writes it."""
    for platform, want in barriers.PLANNED.items():
        with platforms.lowering_for(platform):
            assert barriers.planned() == want
    with platforms.lowering_for("another"):
        assert barriers.planned() == barriers.PLANNED["cpu"]


def test_a_stored_step_for_a_gpu_has_one_barrier_an_operation_backward() -> None:
    """And one around the cotangent that enters; for a CPU two an operation of both sweeps, and more where
    layers have their own there."""
    net, x, _ = network()
    schedule = Schedule(runs=alike(RunKind.STORE, "vjp", len(net)))
    found = {}
    for platform in ("cpu", "gpu"):
        step = mw.value_and_grad(mean_square, schedule)
        with platforms.lowering_for(platform):
            found[platform] = count(lambda net, x, step=step: step(net, x), net, x)
    assert found["gpu"] == 1 + len(net)
    assert found["cpu"] >= 1 + 2 * 2 * len(net)


def test_a_recomputed_stretch_for_a_gpu_has_one_barrier_before_it_and_one_behind() -> None:
    """Neither does the forward pass begin before the cotangent is there, nor the cotangent's way back before
    the activations are there again."""
    net, x, _ = network()
    stored = alike(RunKind.STORE, "vjp", len(net))
    again = Run(kind=RunKind.RECOMPUTE, start=0, stop=3, inner=stored[:3])
    step = mw.value_and_grad(mean_square, Schedule(runs=(again, *stored[3:])))
    with platforms.lowering_for("gpu"):
        assert count(lambda net, x: step(net, x), net, x) == 3 + len(net)


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_do_not_depend_on_barriers(name: str) -> None:
    net, x, schedule = network()
    want = jax.grad(lambda net: mean_square(net(x)))(net)
    step = mw.value_and_grad(mean_square, schedule, arrangement=POLICIES[name])
    (_, report), got = mw.jit(step)(net, x)
    assert relative_error(got, want) < 1e-5
    assert float(report.worst) < 1e-5


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_is_written_for_others_computes_the_same(platform: str) -> None:
    """In loops too, whose bodies have barriers of their own."""
    net, x, schedule = network()
    stored = Schedule(runs=alike(RunKind.STORE, "vjp", len(net)))
    for chain, plan in ((net, schedule), (mw.stack(net, x), stored)):
        want = jax.grad(lambda net: mean_square(net(x)))(chain)
        with platforms.lowering_for(platform):
            step = mw.value_and_grad(mean_square, plan)
            _, got = mw.jit(lambda net, x, step=step: step(net, x))(chain, x)
        assert relative_error(got, want) < 1e-5


def test_on_cpus_all_operations_are_apart() -> None:
    """The program that every platform had before: the planned peak needs it there."""
    if platforms.platform() != "cpu":
        pytest.skip("of XLA:CPU alone")
    net, x, schedule = network()
    texts = {
        traced(mw.value_and_grad(mean_square, schedule, arrangement=way), net, x)
        for way in (0, POLICIES["apart"])
    }
    assert len(texts) == 1


def test_policies_are_values() -> None:
    none = barriers.NONE
    assert Barriers(forward=none, backward=none, inverse=none) == barriers.PLANNED["tpu"]
    gpu = barriers.PLANNED["gpu"]
    assert (gpu.forward.arguments, gpu.forward.results, gpu.forward.constants) == (False, False, True)
    assert (gpu.backward.arguments, gpu.backward.results, gpu.backward.constants) == (False, True, True)
    assert gpu.inverse == barriers.APART
    with pytest.raises(dataclasses.FrozenInstanceError):
        barriers.UNTIED.canonical = True  # type: ignore[misc]


@GPU
def test_on_a_gpu_a_step_moves_what_backpropagation_does() -> None:
    """Where all is stored; and where some is recomputed, less than with all barriers, at their peak."""
    model = maxmin(depth=3, width=64, resolution=32, batch=256)
    args = (model.chain, model.x, model.labels)
    stored = alike(RunKind.STORE, "vjp", len(model.chain))
    again = (Run(kind=RunKind.RECOMPUTE, start=0, stop=6, inner=stored[:6]), *stored[6:])
    plain = jax.value_and_grad(lambda net, x, labels: model.loss(net(x), labels))
    whole = targets.compile(plain, *args, target="h200")
    step = targets.compile(mw.value_and_grad(model.loss, Schedule(runs=stored)), *args, target="h200")
    assert step.moved_bytes <= 1.02 * whole.moved_bytes
    assert step.temporary_bytes <= 1.02 * whole.temporary_bytes
    planned, apart = (
        targets.compile(
            mw.value_and_grad(model.loss, Schedule(runs=again), arrangement=way), *args, target="h200"
        )
        for way in (0, POLICIES["apart"])
    )
    assert planned.moved_bytes < 0.95 * apart.moved_bytes
    assert planned.temporary_bytes <= 1.02 * apart.temporary_bytes
