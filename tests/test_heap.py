"""What XLA:CPU's allocator is said to do with a step, against what it does."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.execution import heap
from mwplan.execution.heap import Heap
from mwplan.execution.interpret import EVEN, Detours
from mwplan.layers import Conv2D, Dense, MaxMin, ReLU, RMSNorm
from mwplan.plans.packing import Buffer
from mwplan.plans.schedule import Run, RunKind
from tests.helpers import relative_error

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's reports")


def loss(y: Any) -> Any:
    """Its gradient needs no memory beside the output and the cotangent."""
    return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, y.shape[-1]))


def store(start: int, option: str) -> Run:
    return Run(kind=RunKind.STORE, start=start, stop=start + 1, options=(option,))


def network() -> tuple[mw.Chain, Any, mw.Schedule]:
    """A plan with four activations alive at most, for which XLA takes five."""
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        Conv2D.init(keys[0], 16, 16, 3),
        MaxMin(),
        Conv2D.init(keys[1], 16, 16, 1),
        Conv2D.init(keys[2], 16, 64, 2, stride=2, padding="VALID"),
        Dense.init(keys[3], 64, 64),
        RMSNorm.init(None, 64),
        MaxMin(),
        ReLU(),
        ReLU(),
    ]
    inner = tuple(store(at, "vjp") for at in range(3))
    runs = (
        Run(kind=RunKind.RECOMPUTE, start=0, stop=3, inner=inner),
        store(3, "vjp"),
        Run(kind=RunKind.INVERT, start=4, stop=5, options=("solve",)),
        store(5, "input"),
        store(6, "bits"),
        store(7, "vjp"),
        store(8, "vjp"),
    )
    return mw.Chain(layers), jax.random.normal(jax.random.key(1), (16, 32, 32, 16)), mw.Schedule(runs=runs)


@functools.cache
def lowered(arrangement: Any) -> Any:
    chain, x, schedule = network()
    return mw.jit(mw.value_and_grad(loss, schedule, arrangement=arrangement)).lower(chain, x)


@functools.cache
def even() -> tuple[Any, Heap]:
    program, found = heap.compiled(lowered(EVEN))
    assert found is not None
    return program, found


def test_the_heap_is_the_programs() -> None:
    """To a thousandth: what is smaller than that, and tables of pointers, is left out."""
    program, found = even()
    assert found.alive <= found.needs(EVEN) <= mw.temporaries(program) <= 1.001 * found.needs(EVEN)
    owners = {owner for owner in found.events if owner}
    assert {"forward 1 0", "forward 1 1", "backward 4 0"} <= owners
    assert "forward 2 0" in owners  # MaxMin, which has no parameter


def test_detours_close_the_hole() -> None:
    """The program asked for needs what is alive, no more; its gradient is the same (JAX 0.11 rounds sums
    otherwise)."""
    chain, x, _ = network()
    plain, (program, found) = lowered(0).compile(), even()
    activation = x.nbytes
    assert min(map(mw.temporaries, (plain, program))) > found.alive + 0.9 * activation
    detours = found.arranged(found.alive + activation // 100)
    assert detours is not None
    arranged = lowered(detours).compile()
    assert found.alive <= mw.temporaries(arranged) < found.alive + activation // 50
    (_, wanted), (_, got) = plain(chain, x), arranged(chain, x)
    assert relative_error(got, wanted) < 1e-6
    assert relative_error(got, jax.grad(lambda c: loss(c(x)))(chain)) < 1e-4


def test_other_detours_are_foretold() -> None:
    """Holes and all, of programs with them in every operation, chosen at random; and the reports do not tell
    of tuples, which the allocator does not place."""
    _, found = even()
    rng = random.Random(1)
    names = sorted({owner for owner in found.events if owner})
    seen = set()
    for _ in range(3):
        detours = Detours(tuple((name, rng.choice([2, 4, 8, 16])) for name in names))
        program, other = heap.compiled(lowered(detours))
        assert other is not None
        seen.add(found.needs(detours))
        assert found.needs(detours) <= mw.temporaries(program) <= 1.001 * found.needs(detours)
        assert len(other.events) - len(found.events) == sum(
            2 * (length - EVEN.others) for _, length in detours.lengths
        )
    assert len(seen) > 1


def test_no_detours_fit_into_less_than_is_alive() -> None:
    _, found = even()
    assert found.arranged(found.alive - 1) is None
    assert Heap((Buffer(64, 0, 1),), (1,), (None,), (None, None)).arranged(64) is None  # nothing to lengthen


def test_a_detour_lengthens_what_lives_beside_it() -> None:
    """Never more than two at once: if the last but one outlives the others it is placed first, and in a row
    of five the parity is wrong for two places."""
    lives = ((0, 2), (1, 4), (3, 6), (5, 8), (7, 10), (11, 12))
    events = tuple("a" if at == 9 else None for at in range(13))
    found = Heap(
        tuple(Buffer(64, *life) for life in lives), tuple(stop for _, stop in lives), (None,) * 6, events
    )
    needs = {length: found.needs(Detours((("a", length),))) for length in (0, 100)}
    assert found.alive == 128
    assert needs == {0: 128, 100: 192}
    large = dataclasses.replace(
        found,
        buffers=(*found.buffers, Buffer(64, 6, 9)),
        firsts=(*found.firsts, 9),
        owners=(*found.owners, "a"),
    )
    assert large.alive == 128  # a detour that is itself large counts where it is made
    assert [large.needs(Detours((("a", length),))) for length in (0, 2)] == [128, 192]
    detours = found.arranged(128)
    assert detours is not None
    assert found.needs(detours) == 128


def test_reports_of_another_form_are_not_read() -> None:
    assert heap.read("", "", "") is None
    assert heap.read("", "BufferLiveRange:\n    a{}:1-2", "allocation 0: size 3, thread-local:") is None


@pytest.mark.parametrize("page", ["", " page 0,"])  # JAX 0.10 and 0.11
def test_reports_are_read(page: str) -> None:
    """`b` is written in the place of `a`, which it reads last; `c` is part of a detour; `d` comes once `b` is
    gone."""
    program = """
  %a = f32[256]{0} fusion(%p), metadata={op_name="jit(step)/jvp(add)"}
  ROOT %c = f32[16]{0} negate(%p), metadata={op_name="jit(step)/transpose(jvp(detour:backward 1 0))/neg"}
"""
    ranges = ("a{}:0-1", "b{}:1-3", "c{}:2-3", "d{1}:4-5", "e{}:2-5")
    lives = "  InstructionSequence:\n    0:a\n  BufferLiveRange:\n" + "".join(
        f"    {one}\n" for one in ranges
    )
    places = "\n".join(
        [
            "allocation 0: size 4, parameter 0, shape |f32[]| at ShapeIndex {}:",
            " value: <1 p @0> (size=4,offset=0): f32[]",
            f"allocation 3: size 2112,{page} preallocated-temp:",
            " value: <2 a @0> (size=1024,offset=0): f32[256]{0}",
            " value: <3 b @0> (size=1024,offset=0): f32[256]{0}",
            " value: <4 c @0> (size=64,offset=1024): f32[16]{0}",
            " value: <5 d{1} @0> (size=2048,offset=0): f32[512]{0}",
            " value: <6 e{} @0> (size=16,offset=2048): (f32[512]{0}, f32[512]{0})",
            "",
        ]
    )
    found = heap.read(program, lives, places)
    assert found == Heap(
        buffers=(Buffer(1024, 0, 4), Buffer(64, 3, 5), Buffer(2048, 6, 7)),
        firsts=(1, 5, 7),
        owners=(None, "backward 1 0", None),
        events=(None, None, None, "backward 1 0", None, "backward 1 0", None, None),
    )
