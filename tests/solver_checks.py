"""Checks and chains that the solvers' tests share."""

from __future__ import annotations

import dataclasses
import random

import pytest

from mwplan.plans.ledger import replay
from mwplan.plans.profiles import LayerProfile, Profile, StoreOption
from mwplan.plans.schedule import Run, RunKind
from mwplan.solvers.frontier import Frontier
from tests.chains import random_profile


def pareto(costs: dict[int, int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for need in sorted(costs):
        if not out or costs[need] < out[-1][1]:
            out.append((need, costs[need]))
    return tuple(out)


def ledgered(profile: Profile, frontier: Frontier, step: int = 1) -> None:
    for need, time in frontier.points[::step]:
        solution = frontier.at(need)
        found = replay(profile, solution.runs or ())
        assert (found.peak_bytes, found.time_ns) == (need, time) == (solution.peak_bytes, solution.time_ns)
        assert found.error <= 1e-4 * (1 + 1e-12)
        assert solution.error == pytest.approx(found.error)


def repeated(profile: Profile) -> Profile:
    layer = profile.layers[0]
    n = len(profile) + 1
    return dataclasses.replace(
        profile,
        layers=tuple(dataclasses.replace(layer, name=f"copy{k}") for k in range(n - 1)),
        activation_bytes=(3,) * n,
        cotangent_bytes=(3,) * n,
        sweep_cotangent_bytes=(4,) * n,
    )


def in_a_row(rng: random.Random, before: int, size: int, after: int) -> Profile:
    """`size` equal layers between others."""
    profile = random_profile(rng, before + after + 1, scale=rng.choice([5, 50]))
    counts = {}
    for what in ("activation_bytes", "cotangent_bytes", "sweep_cotangent_bytes"):
        own = getattr(profile, what)
        counts[what] = (
            *own[:before],
            *[own[before]] * size,
            *[own[before]] * (after > 0),
            *own[before + 2 :],
        )
        counts[what] += (own[before],) * (after == 0)
    middle = profile.layers[before : before + 1] * size
    layers = (*profile.layers[:before], *middle, *profile.layers[before + 1 :])
    return dataclasses.replace(profile, layers=layers, **counts)


def distinct(profile: Profile, runs: tuple[Run, ...]) -> int:
    """How many different outermost runs there are, written without the solver's help."""
    kept, seen = True, set()
    for run in runs:

        def relative(x: Run, base: int = run.start) -> tuple[object, ...]:
            return (
                x.kind,
                x.start - base,
                x.stop - base,
                x.options,
                tuple(relative(y, base) for y in x.inner),
            )

        at = [
            (
                dataclasses.replace(profile.layers[i], name=""),
                profile.activation_bytes[i + 1],
                profile.cotangent_bytes[i + 1],
                profile.sweep_cotangent_bytes[i + 1],
            )
            for i in range(run.start, run.stop)
        ]
        i = run.start
        start = (
            profile.activation_bytes[i],
            profile.cotangent_bytes[i],
            profile.sweep_cotangent_bytes[i],
            kept,
        )
        seen.add((start, tuple(at), relative(run)))
        last = profile.layers[run.stop - 1]
        kept = run.kind is RunKind.INVERT
        if run.kind is RunKind.STORE:
            kept = next(o for o in last.store if o.name == run.options[0]).keeps_output
        elif run.kind is RunKind.MOONWALK:
            kept = next(o for o in last.moonwalk if o.name == run.options[-1]).keeps_output
    return len(seen)


def chain_of(n: int, **changes: int) -> Profile:
    option = StoreOption(
        name="all", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=2
    )
    layer = LayerProfile(name="x", forward_ns=1, store=(dataclasses.replace(option, **changes),))
    counts = (8,) * (n + 1)
    return Profile(
        layers=(layer,) * n, activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )


def unit_chain(n: int) -> Profile:
    """Steps of cost 1, activations of 1 byte, cotangents free: the time of a schedule is its number of
    forward steps."""
    option = StoreOption(
        name="x", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=0
    )
    layer = LayerProfile(name="step", forward_ns=1, store=(option,))
    return Profile(
        layers=(layer,) * n,
        activation_bytes=(1,) * (n + 1),
        cotangent_bytes=(0,) * (n + 1),
        sweep_cotangent_bytes=(0,) * (n + 1),
    )
