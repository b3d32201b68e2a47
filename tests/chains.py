"""Random profiles for the solvers' tests: small sizes, all options, every irregularity the accounting
knows."""

from __future__ import annotations

import dataclasses
import random

from mwplan.plans.profiles import (
    InvertOption,
    LayerProfile,
    MoonwalkOption,
    OffloadOption,
    Profile,
    StoreOption,
)


class _Random:
    """Random options of one chain: costs up to a few times `scale`; `flags`, the chance of each flag."""

    def __init__(self, rng: random.Random, scale: int, flags: float) -> None:
        self.rng, self.scale, self.flags = rng, scale, flags

    def n(self, top: int) -> int:
        return self.rng.randint(0, top)

    def flag(self) -> bool:
        return self.rng.random() < self.flags

    def store(self, name: str, forward: int, *, plain: bool) -> StoreOption:
        scale = self.scale
        return StoreOption(
            name=name,
            residual_bytes=self.n(2 * scale),
            keeps_input=plain or self.flag(),
            keeps_output=not plain and self.flag(),
            forward_ns=forward,
            backward_ns=forward + self.n(2 * scale),
            forward_workspace_bytes=self.n(scale),
            backward_workspace_bytes=self.n(scale),
            backward_saving_bytes=self.n(scale // 4),
        )

    def moonwalk(self, name: str, forward: int) -> MoonwalkOption:
        scale = self.scale
        return MoonwalkOption(
            name=name,
            residual_bytes=self.n(scale // 4),
            keeps_input=self.flag(),
            keeps_output=self.flag(),
            fragment_bytes=self.rng.choice([0, self.n(scale)]),
            forward_ns=forward + self.n(2),
            reverse_ns=self.n(scale),
            rebuild_ns=self.n(2 * scale),
            forward_workspace_bytes=self.n(scale),
            reverse_workspace_bytes=self.n(scale),
            rebuild_workspace_bytes=self.n(scale),
            advance_workspace_bytes=self.n(scale),
            last_workspace_bytes=self.n(scale),
            fragment_is_cotangent=self.flag(),
            reverse_saving_bytes=self.n(scale // 4),
            rebuild_saving_bytes=self.n(scale // 4),
            advance_saving_bytes=self.n(scale // 4),
            local_error=self.rng.choice([0.0, 1e-6, 2e-5, 2e-4]),
            growth=self.rng.choice([0.0, 0.9, 2.0, 5.0, float("inf")]),
        )

    def invert(self, name: str, forward: int) -> InvertOption:
        rng, scale = self.rng, self.scale
        return InvertOption(
            name=name,
            residual_bytes=rng.choice([0, self.n(scale)]),
            forward_ns=forward + self.n(2),
            forward_workspace_bytes=self.n(scale),
            backward_ns=forward + self.n(3 * scale),
            backward_workspace_bytes=self.n(scale),
            backward_saving_bytes=self.n(scale // 4),
            local_error=rng.choice([0.0, 1e-6, 5e-5]),
            growth=rng.choice([0.0, 1.0, 3.0]),
            sensitivity=rng.choice([0.0, 0.5, 20.0]),
            kink=rng.choice([0.0, 0.0, 1e-5]),
            gradient_sensitivity=rng.choice([0.0, 1.0, 30.0, float("inf")] if self.n(9) == 0 else [0.0, 2.0]),
        )


def random_profile(
    rng: random.Random,
    size: int,
    *,
    stores: int = 2,
    moonwalks: int = 2,
    inverts: int = 1,
    scale: int = 8,
    flags: float = 0.25,
    plain: bool = False,
) -> Profile:
    """A chain of `size` layers with up to so many options each; byte and time costs up to a few times
    `scale`.

    `flags` is the chance of each of `keeps_input`, `keeps_output`. `plain`: one STORE option only, input
    kept.
    """
    made = _Random(rng, scale, flags)
    layers = []
    for _ in range(size):
        forward = 1 + made.n(scale)
        store = [
            made.store(f"s{k}", forward, plain=plain) for k in range(1 if plain else rng.randint(1, stores))
        ]
        moonwalk = [made.moonwalk(f"m{k}", forward) for k in range(0 if plain else made.n(moonwalks))]
        invert = [made.invert(f"i{k}", forward) for k in range(0 if plain else made.n(inverts))]
        layers.append(
            LayerProfile(
                name=f"layer{rng.randint(0, 1)}",
                forward_ns=forward,
                forward_workspace_bytes=made.n(scale),
                store=tuple(store),
                moonwalk=tuple(moonwalk),
                invert=tuple(invert),
            )
        )
    activation = tuple(1 + made.n(scale) for _ in range(size + 1))
    cotangent = tuple(max(0, a + rng.choice([0, 0, -1])) for a in activation)
    sweep = tuple(c * rng.choice([1, 1, 2]) for c in cotangent)
    return Profile(
        layers=tuple(layers),
        activation_bytes=activation,
        cotangent_bytes=cotangent,
        sweep_cotangent_bytes=sweep,
    )


def with_host(rng: random.Random, profile: Profile, scale: int = 8) -> Profile:
    """`profile` with up to two ways for each layer to store in the host's memory, most of them slower than on
    the device."""

    def option(layer: LayerProfile, name: str) -> OffloadOption:
        return OffloadOption(
            name=name,
            host_bytes=rng.randint(1, 2 * scale),
            forward_ns=layer.forward_ns + rng.randint(0, scale),
            backward_ns=layer.forward_ns + rng.randint(0, 3 * scale),
            forward_workspace_bytes=rng.randint(0, scale),
            backward_workspace_bytes=rng.randint(0, scale),
        )

    layers = [
        dataclasses.replace(x, offload=tuple(option(x, f"h{k}") for k in range(rng.randint(0, 2))))
        for x in profile.layers
    ]
    return dataclasses.replace(profile, layers=tuple(layers))
