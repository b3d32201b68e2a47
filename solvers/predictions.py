"""What is predicted of runs, whichever solver made them: errors, and the least time of any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mwplan.plans.profiles import InvertOption, MoonwalkOption, Profile
from mwplan.plans.schedule import Run, RunKind, Strategy, walk


def moonwalk_strategy(option: MoonwalkOption) -> Strategy:
    """VIJP if the option keeps no fragment, else FRAGMENT."""
    return Strategy.FRAGMENT if option.fragment_bytes else Strategy.VIJP


def error_of(profile: Profile, runs: Iterable[Run]) -> float:
    """The predicted error of `runs`: the largest of the MOONWALK runs' or, if larger, the INVERT runs'
    together; inner ones included."""
    worst = inverted = 0.0
    for run in walk(tuple(runs)):
        layers = profile.layers[run.start : run.stop]
        if run.kind is RunKind.MOONWALK:
            error = 0.0
            for layer, name in zip(layers, run.options):
                o = next(o for o in layer.moonwalk if o.name == name)
                error = math.hypot(o.growth * error, o.local_error)
                worst = max(worst, error)
        elif run.kind is RunKind.INVERT:
            chosen = [next(o for o in x.invert if o.name == n) for x, n in zip(layers, run.options)]
            inverted = math.hypot(inverted, invert_error(chosen))
    return max(worst, inverted)


def invert_error(options: Sequence[InvertOption]) -> float:
    """The error of an INVERT run by these options, input first: of its activations, of its gradients, and of
    the cotangent that leaves it."""
    error = left = worst = 0.0
    for o in reversed(options):
        error = math.hypot(o.growth * error, o.local_error)
        kinked = math.hypot(left, math.sqrt(o.kink * error))
        worst = max(worst, error, math.hypot(kinked, o.gradient_sensitivity * error))
        left = math.hypot(kinked, o.sensitivity * error)
        worst = max(worst, left)
    return worst


def invert_share(max_error: float, layers: Any, size: int) -> Any:
    """The largest error allowed to an INVERT run of `layers` layers (a number or an array of them) in a chain
    of `size`: the runs' errors add in squares."""
    return max_error * np.sqrt(layers / size)


def fastest_ns(profile: Profile) -> int:
    """No schedule is faster: every layer by its fastest option, whatever its bytes and error."""
    total = 0
    for layer in profile.layers:
        ways = [o.forward_ns + o.backward_ns for o in layer.store]
        ways += [o.forward_ns + o.reverse_ns + o.rebuild_ns for o in layer.moonwalk]
        ways += [o.forward_ns + o.backward_ns for o in layer.invert]
        ways += [o.forward_ns + o.backward_ns for o in layer.offload]
        total += min(ways)
    return total
