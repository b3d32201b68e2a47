"""Small indices packed into bytes, as each platform packs them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwplan.common import platforms, tiles, trees
from mwplan.layers.activations import _exchange
from mwplan.network.bits import Packing, bits_for

SHAPES = [(0,), (1,), (13,), (3, 5), (8, 512), (4, 2, 7, 16), (16, 7, 7, 128), (2, 3, 8, 130)]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 200, 300])
def test_what_is_packed_is_unpacked(platform: str, count: int) -> None:
    for shape in SHAPES:
        index = np.random.default_rng(0).integers(0, count, size=shape)
        with platforms.lowering_for(platform):
            packing = Packing.of(shape, count)
        packed = packing.pack(jnp.asarray(index))
        assert packed.dtype == {8: jnp.uint8, 16: jnp.uint16}[max(8, bits_for(count))]
        assert packed.size <= index.size
        assert np.array_equal(packing.unpack(packed), index)


def test_a_tpus_packing_divides_an_axis_that_costs_no_padding() -> None:
    with platforms.lowering_for("tpu"):
        for shape, want in [
            ((2048, 16, 16, 32), (2048, 2, 16, 32)),  # of a convolution: the batch along the lanes of tiles
            ((256, 7, 7, 512), (256, 1, 7, 512)),  # no byte of two devices' examples
            ((8, 512, 512), (8, 64, 512)),
        ]:
            packing = Packing.of(shape, 2)
            assert packing.worth
            packed = jax.eval_shape(packing.pack, jax.ShapeDtypeStruct(shape, jnp.bool_))
            assert packed.shape == want
            assert tiles.padded_bytes(want, 8) == math.prod(want)
        # Thirteen bytes take a tile as a hundred do.
        assert not Packing.of((1, 100), 2).worth
        assert not Packing.of((100,), 2).worth


@pytest.mark.parametrize(
    ("shape", "bits", "want"),
    [
        ((8, 128), 32, 4096),
        ((1, 128), 32, 512),  # low tiles for few rows
        ((3, 128), 32, 2048),
        ((9, 129), 32, 16 * 256 * 4),
        ((256, 16, 16, 64), 32, 256 * 16 * 16 * 64 * 4),
        ((4, 16, 16, 64), 32, 4 * 16 * 16 * 128 * 4),
        ((2, 512, 512), 8, 2 * 512 * 512),
        ((8, 512, 8, 64), 32, 8 * 512 * 8 * 64 * 4),  # of attention: the positions along the lanes
        ((100,), 32, 512),
        ((2000,), 32, 8192),
        ((), 32, 512),
    ],
)
def test_padding(shape: tuple[int, ...], bits: int, want: int) -> None:
    assert tiles.padded_bytes(shape, bits) == want


def test_what_waits_is_the_same() -> None:
    tree = {"a": jnp.arange(3), "b": jnp.array([True, False]), "c": jax.random.key(0), "d": 0.5}
    first = [jnp.full((2, 2), jnp.nan), jnp.ones(0)]
    with platforms.lowering_for("tpu"):
        waits = jax.jit(lambda first: trees.after(tree, first))(first)
        assert trees.after(tree, jnp.arange(3)) is tree  # for integers nothing waits
    assert jax.tree.map(jnp.result_type, waits) == jax.tree.map(jnp.result_type, tree)
    for name in "abd":
        assert np.array_equal(waits[name], tree[name])
    assert trees.after(tree, first) is tree


def test_maxmin_is_undone_on_every_platform() -> None:
    ct, swap = jax.random.normal(jax.random.key(0), (5, 3, 8)), jnp.arange(60).reshape(5, 3, 4) % 3 == 0
    want = _exchange(ct, swap)
    with platforms.lowering_for("tpu"):
        assert np.array_equal(_exchange(ct, swap), want)
    assert not np.array_equal(want, ct)
