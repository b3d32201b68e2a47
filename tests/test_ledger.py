"""The ledger against sums done by hand on a chain of equal layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mwplan as mw
from mwplan.plans.ledger import strategies
from mwplan.plans.profiles import InvertOption, LayerProfile, MoonwalkOption, StoreOption
from mwplan.plans.schedule import Run, RunKind

A = 100  # bytes of an activation and of a cotangent


def chain(size: int) -> mw.Profile:
    """Equal layers: keeping the input stores them; one byte of input residuals; fragments 0, 30 or whole."""
    fast = {
        "keeps_input": False,
        "keeps_output": False,
        "residual_bytes": 1,
        "forward_ns": 10,
        "reverse_ns": 10,
    }
    layer = LayerProfile(
        name="layer",
        forward_ns=10,
        store=(
            StoreOption(
                name="vjp",
                residual_bytes=0,
                keeps_input=True,
                keeps_output=False,
                forward_ns=10,
                backward_ns=20,
            ),
        ),
        moonwalk=(
            MoonwalkOption(
                name="exact", fragment_bytes=0, rebuild_ns=15, local_error=1e-7, growth=2.0, **fast
            ),
            MoonwalkOption(
                name="part", fragment_bytes=30, rebuild_ns=15, local_error=1e-7, growth=1.0, **fast
            ),
            MoonwalkOption(name="whole", fragment_bytes=A, fragment_is_cotangent=True, rebuild_ns=10, **fast),
        ),
        invert=(InvertOption(name="inverse", forward_ns=10, backward_ns=30, local_error=1e-6, growth=1.0),),
    )
    sizes = (A,) * (size + 1)
    return mw.Profile(
        layers=(layer,) * size, activation_bytes=sizes, cotangent_bytes=sizes, sweep_cotangent_bytes=sizes
    )


def store(at: int) -> Run:
    return Run(kind=RunKind.STORE, start=at, stop=at + 1, options=("vjp",))


def walk(start: int, stop: int, *names: str) -> Run:
    return Run(kind=RunKind.MOONWALK, start=start, stop=stop, options=names or ("exact",) * (stop - start))


def redo(start: int, stop: int, *inner: Run) -> Run:
    return Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=inner)


def invert(start: int, stop: int) -> Run:
    return Run(kind=RunKind.INVERT, start=start, stop=stop, options=("inverse",) * (stop - start))


@pytest.mark.parametrize(
    ("runs", "peak", "time", "sweep"),
    [
        # x_1..x_3 kept for layers 2..4, x_4 and its cotangent at the turn
        ([store(i) for i in range(4)], 5 * A, 4 * 30, "turn"),
        # one run from the input: x_{l-1}, ct_0, ct_{l-1}, ct_l in the vijp, then x_l in place of ct_{l-1}
        ([walk(0, 4)], 4 * A, 4 * 35 + 3 * 10, "rebuild"),
        # the first run's residuals (2); x_2, x_3, ct_2, ct_3 as the second run advances, and as much in its
        # next vijp
        ([walk(0, 2), walk(2, 4)], 4 * A + 2, 4 * 35 + 2 * 10, "advance"),
        # x_1 held; x_2, x_3, ct_2, ct_3 and the fragment of layer 4 (30)
        ([store(0), store(1), walk(2, 4, "part", "part")], 5 * A + 30, 2 * 30 + 2 * 35 + 10, "advance"),
        # x_1..x_3 recomputed while ct_4 waits, then x_4's layer backward: x_1, x_2, x_3, ct_4, ct_3
        ([redo(0, 4, *[store(i) for i in range(4)])], 5 * A, 4 * 10 + 4 * 30, "forward"),
        # x_4, x_3 and two cotangents; nothing else
        ([invert(0, 4)], 4 * A, 4 * 40, "backward"),
        # the first run keeps x_2 while the second works
        ([invert(0, 2), invert(2, 4)], 5 * A, 4 * 40, "backward"),
    ],
)
def test_by_hand(runs: list[Run], peak: int, time: int, sweep: str) -> None:
    got = mw.replay(chain(4), runs)
    assert (got.peak_bytes, got.time_ns, got.binding.sweep) == (peak, time, sweep)


def test_a_whole_fragment_is_the_cotangent_itself() -> None:
    """R of layer 2: x-residuals 2, ct_2 which is also its fragment, ct_1. Not 3 A + 2."""
    events = mw.replay(chain(2), [walk(0, 2, "exact", "whole")]).events
    first = next(e for e in events if e.sweep == "reverse")
    assert (first.layer, first.live_bytes) == (2, 2 * A + 2)


def test_errors_add_in_squares_and_restart() -> None:
    growing = mw.replay(chain(3), [walk(0, 3)]).error
    assert growing == pytest.approx(1e-7 * (1 + 4 + 16) ** 0.5)
    restarted = mw.replay(chain(3), [walk(0, 3, "exact", "whole", "exact")]).error
    assert restarted == pytest.approx(1e-7)
    assert mw.replay(chain(2), [invert(0, 2)]).error == pytest.approx(2**0.5 * 1e-6)
    assert mw.replay(chain(2), [store(0), store(1)]).error == 0


def test_what_an_inverse_does_to_gradients_is_its_error() -> None:
    """Activations off by 1, sqrt 2, sqrt 3 (times 1e-6) change cotangents by 10 times that, which add up and
    leave the run."""

    def sensitive(size: int, **change: float) -> mw.Profile:
        made = chain(size)
        one = dataclasses.replace(made.layers[0].invert[0], **change)  # type: ignore[arg-type]
        return dataclasses.replace(made, layers=(dataclasses.replace(made.layers[0], invert=(one,)),) * size)

    moved = sensitive(3, sensitivity=10.0)
    got = mw.replay(moved, [invert(0, 3)])
    assert got.error == pytest.approx(1e-5 * (1 + 2 + 3) ** 0.5)
    # x_0 is there already: the report compares x_1, which is off by sqrt 2.
    np.testing.assert_allclose(got.report_scales, [(10 * (6 / 2) ** 0.5, 0)])
    # A gradient's own error does not go on; that of the cotangent before it counts.
    both = mw.replay(sensitive(3, sensitivity=10.0, gradient_sensitivity=100.0), [invert(0, 3)])
    assert both.error == pytest.approx(1e-5 * (1 + 2 + 100 * 3) ** 0.5)
    # Kinks add the error itself, not its square.
    kinked = mw.replay(sensitive(3, kink=0.01), [invert(0, 3)])
    np.testing.assert_allclose(kinked.report_scales, [(0, 0.01 * (1 + 2**0.5 + 3**0.5) / 2**0.5)])
    assert kinked.error == pytest.approx((0.01 * 1e-6 * (1 + 2**0.5 + 3**0.5)) ** 0.5)
    # Runs add in squares, wherever they are; a MOONWALK run's error is its own.
    runs = [redo(0, 1, invert(0, 1)), walk(1, 2), invert(2, 3)]
    assert mw.replay(moved, runs).error == pytest.approx(1e-5 * 2**0.5)
    np.testing.assert_allclose(mw.replay(moved, runs).report_scales, [(10, 0), (1, 0), (10, 0)])
    assert mw.replay(sensitive(1, local_error=0.0, sensitivity=float("inf")), [invert(0, 1)]).error == 0


def test_nested_runs_count_their_depth() -> None:
    got = mw.replay(chain(4), [redo(0, 4, redo(0, 2, store(0), store(1)), store(2), store(3))])
    assert max(e.depth for e in got.events) == 2
    assert got.time_ns == 40 + 20 + 4 * 30


def test_strategies_are_the_outermost() -> None:
    runs = [store(0), redo(1, 3, walk(1, 3)), walk(3, 5, "exact", "part")]
    names = [s.name for s in strategies(chain(5), runs)]
    assert names == ["STORE", "RECOMPUTE", "RECOMPUTE", "VIJP", "FRAGMENT"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(mw.ScheduleMismatchError, match="4 layers"):
        mw.replay(chain(4), [store(0)])
    with pytest.raises(mw.ScheduleMismatchError, match="no moonwalk option 'magic'"):
        mw.replay(chain(1), [walk(0, 1, "magic")])
