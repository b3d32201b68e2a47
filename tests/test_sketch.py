"""Sketches: how far two arrays are apart, wherever they differ."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from mwplan.compilers.compiling import temporaries
from mwplan.network import sketch

IMAGES = [(64, 32, 32, 16), (21, 30, 30, 16)]
CASES = [
    *(
        (shape, where)
        for shape in IMAGES
        for where in ("everywhere", "one example", "an edge", "one channel")
    ),
    *(((3, 1_000_003), where) for where in ("everywhere", "one example")),  # a size without divisors
    ((30, 10), "everywhere"),
]


@pytest.mark.parametrize(("shape", "where"), CASES)
def test_the_distance_is_right_within_a_factor_of_two(shape: tuple[int, ...], where: str) -> None:
    """Of large arrays few rows are read: a difference in an example, an edge or a channel is seen all the
    same."""
    keys = jax.random.split(jax.random.key(len(shape)), 2)
    truth, noise = (jax.random.normal(key, shape) for key in keys)
    if where == "one example":
        noise = noise.at[1:].set(0)
    elif where == "an edge":
        noise = noise.at[:, 1:].set(0)
    elif where == "one channel":
        noise = noise.at[..., 1:].set(0)
    got = truth + 1e-3 * noise
    true = float(jnp.linalg.norm((got - truth).ravel()) / jnp.linalg.norm(truth.ravel()))
    reported = float(sketch.discrepancy(sketch.take(truth), sketch.take(got)))
    assert true / 2 < reported < 2 * true


def test_a_large_array_is_read_in_part() -> None:
    """What makes it cheap: the operations of a sketch's product are a seventh of the array's."""

    def flop(a: Array) -> float:
        return jax.jit(sketch.take).lower(a).compile().cost_analysis()["flops"]

    assert flop(jnp.ones((64, 32, 32, 16))) < 0.2 * 2 * 8 * 2**20


def test_equal_arrays_and_zeros() -> None:
    a = jnp.ones((3, 5))
    assert float(sketch.discrepancy(sketch.take(a), sketch.take(a))) == 0
    assert float(sketch.discrepancy(sketch.take(0 * a), sketch.take(0 * a))) == 0
    assert sketch.take([]).shape == (64,)


@pytest.mark.parametrize("shape", [(64, 32, 32, 16), (48, 64, 64, 16)])
def test_a_sketch_copies_next_to_nothing(shape: tuple[int, ...]) -> None:
    """No schedule's figure counts its workspace: it has to be small beside the array."""

    def sketched(a: Array) -> Array:
        return sketch.take(a)

    assert temporaries(jax.jit(sketched).lower(jnp.ones(shape)).compile()) <= 4 * math.prod(shape) / 128
