"""The chains that the solvers are measured on.

Random heterogeneous chains: activations of 2 to 40 MiB, forwards of 0.1 to 1 ms, two STORE options;
`submersive` chains have four moonwalk options a layer besides (fragments of 0, 10 and 30%, and whole
cotangents, with growth from 5 down to 0). Identical chains repeat one such layer.
"""

from __future__ import annotations

import dataclasses
import random

from mwplan.plans.profiles import LayerProfile, MoonwalkOption, Profile, StoreOption


def chain(seed: int, size: int, *, submersive: bool) -> Profile:
    """One random chain, as the module's docstring says."""
    rng = random.Random(seed)
    mib = 1 << 20
    activation = [int(rng.uniform(2, 40) * mib) // 4 * 4 for _ in range(size + 1)]
    layers = []
    for at in range(size):
        forward, out = int(rng.uniform(1, 10) * 1e5), activation[at + 1]
        small = StoreOption(
            name="input",
            residual_bytes=0,
            keeps_input=True,
            keeps_output=False,
            forward_ns=forward,
            backward_ns=3 * forward,
        )
        full = dataclasses.replace(
            small, name="all", residual_bytes=int(out * rng.uniform(0.5, 2)) // 4 * 4, backward_ns=2 * forward
        )
        moonwalk = []
        for name, share, growth in (
            ("f0", 0.0, rng.uniform(2, 5)),
            ("f10", 0.1, rng.uniform(1.2, 2)),
            ("f30", 0.3, rng.uniform(0.8, 1)),
            ("whole", 1.0, 0.0),
        ):
            moonwalk.append(
                MoonwalkOption(
                    name=name, residual_bytes=out // 32, keeps_input=False, keeps_output=False,
                    fragment_bytes=int(out * share), fragment_is_cotangent=share == 1.0, forward_ns=forward,
                    reverse_ns=forward, rebuild_ns=int(forward * (1 if share == 1 else 1.3 + share)),
                    growth=growth, local_error=0.0 if share == 1 else 2e-6,
                )
            )  # fmt: skip
        layers.append(
            LayerProfile(
                name="layer",
                forward_ns=forward,
                store=(full, small),
                moonwalk=tuple(moonwalk) if submersive else (),
            )
        )
    counts = tuple(activation)
    return Profile(
        layers=tuple(layers), activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )


def identical(size: int, *, submersive: bool) -> Profile:
    """`size` times the first layer of a random chain."""
    first = chain(0, 1, submersive=submersive)
    counts = (first.activation_bytes[1],) * (size + 1)
    return Profile(
        layers=first.layers * size,
        activation_bytes=counts,
        cotangent_bytes=counts,
        sweep_cotangent_bytes=counts,
    )


def deep(size: int, *, submersive: bool) -> Profile:
    """Two random layers, `size` identical ones, two random layers."""
    ends, body = chain(1, 4, submersive=submersive), identical(size, submersive=submersive)
    counts = (*ends.activation_bytes[:2], *body.activation_bytes, *ends.activation_bytes[3:])
    return Profile(
        layers=ends.layers[:2] + body.layers + ends.layers[2:],
        activation_bytes=counts,
        cotangent_bytes=counts,
        sweep_cotangent_bytes=counts,
    )
