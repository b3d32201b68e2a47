"""Chains cut into parts: stretches of identical layers, and what lies between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mwplan.plans.profiles import LayerProfile, Profile
from mwplan.solvers.pareto import Stairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a part of a chain stands: after the first `first` layers of `whole`; `ends`, the staircases of
    what follows it, without and with its first input kept, None where nothing does."""

    whole: Profile
    first: int = 0
    ends: tuple[Stairs, Stairs] | None = None


def is_uniform(profile: Profile) -> bool:
    """Whether all layers are equal (names apart) and all boundaries alike."""
    return stretches(profile, 1) == [(0, len(profile), True)]


def repeated(profile: Profile, size: int) -> Profile:
    """`size` times the first layer of a uniform chain."""
    return dataclasses.replace(
        profile,
        layers=profile.layers[:1] * size,
        activation_bytes=profile.activation_bytes[:1] * (size + 1),
        cotangent_bytes=profile.cotangent_bytes[:1] * (size + 1),
        sweep_cotangent_bytes=profile.sweep_cotangent_bytes[:1] * (size + 1),
    )


def stretches(profile: Profile, least: int) -> list[tuple[int, int, bool]]:
    """The chain in parts `(start, stop, uniform)`: stretches of at least `least` equal layers (names apart)
    between equal boundaries, and what lies between them."""
    boundaries = list(
        zip(profile.activation_bytes, profile.cotangent_bytes, profile.sweep_cotangent_bytes, strict=True)
    )
    out: list[tuple[int, int, bool]] = []
    start = done = 0
    for at in range(1, len(profile) + 1):
        # Whether layer at + 1 goes on with the stretch from `start`.
        same = at < len(profile) and boundaries[start] == boundaries[at] == boundaries[at + 1]
        if same and _alike(profile.layers[start], profile.layers[at]):
            continue
        if at - start >= least and boundaries[start] == boundaries[start + 1]:
            out += [(done, start, False)] if start > done else []
            out.append((start, at, True))
            done = at
        start = at
    return out + ([(done, len(profile), False)] if done < len(profile) else [])


def _alike(one: LayerProfile, other: LayerProfile) -> bool:
    return one is other or one.costs() == other.costs()


def part(profile: Profile, start: int, stop: int) -> Profile:
    """The layers `start+1..stop`."""
    return dataclasses.replace(
        profile,
        layers=profile.layers[start:stop],
        activation_bytes=profile.activation_bytes[start : stop + 1],
        cotangent_bytes=profile.cotangent_bytes[start : stop + 1],
        sweep_cotangent_bytes=profile.sweep_cotangent_bytes[start : stop + 1],
    )
