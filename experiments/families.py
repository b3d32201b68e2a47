"""Every family of layers that carries an error from layer to layer, as blocks to repeat: for
`experiments.growth`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mwplan import layers as ml

#: Shapes of the inputs: rows, signals and images, each with the batch first and the channels last.
ROWS, SIGNALS, IMAGES = (64, 64), (8, 32, 16), (4, 8, 8, 16)
#: Families that are also inverted.
INVERTED = (
    "Dense exact", "LeakyReLU 0.5", "Permute", "Sequential", "Coupling", "Coupling of norms",
    "Conv1D circular", "OrthogonalConv", "OrthogonalDense cayley", "MaxMin", "GroupSort 4", "Smooth gelu",
    "Residual fixed 16", "Dense He exact", "SpaceToDepth",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Layers that keep the shape of their input, to be repeated.

    `block(key)` makes them. `option`: which option the layers take; None, or where they do not have it, their
    first. `inverse`: whether the inverse is studied.
    """

    block: Callable[[Any], list[Any]]
    shape: tuple[int, ...]
    option: str | None = None
    inverse: bool = False


Families = dict[str, Family]


def families() -> Families:
    """Every family of the layer library with every option that carries an error from layer to layer, and
    every inverse."""
    made = (
        _dense()
        | _elementwise_and_norms()
        | _moves_and_blocks()
        | _pooling()
        | _convolutions()
        | _parametrised()
        | _cokernels()
    )
    inverted = {f"invert {name}": dataclasses.replace(made[name], inverse=True) for name in INVERTED}
    inverted["invert Coupling of norms, bits"] = dataclasses.replace(
        inverted["invert Coupling of norms"], option="subtract_bits"
    )
    return made | inverted


def _after_dense(*after: Any) -> Callable[[Any], list[Any]]:
    """An orthogonal dense layer, and what follows it."""
    return lambda key: [ml.Dense.init(key, 64, 64), *after]


def _dense() -> Families:
    return {
        "Dense exact": Family(_after_dense(ml.LeakyReLU(0.8)), ROWS, "exact"),
        "Dense exact+refine": Family(_after_dense(ml.LeakyReLU(0.8)), ROWS, "exact+refine"),
        "Dense null": Family(lambda k: [ml.Dense.init(k, 64, 96), ml.Dense.init(k, 96, 64)], ROWS),
        "OrthogonalDense null": Family(
            lambda k: [ml.OrthogonalDense.init(k, 64, 96), ml.OrthogonalDense.init(k, 96, 64)], ROWS
        ),
    }


def _elementwise_and_norms() -> Families:
    return {
        "LeakyReLU 0.5": Family(_after_dense(ml.LeakyReLU(0.5)), ROWS),
        "LeakyReLU 0.3": Family(_after_dense(ml.LeakyReLU(0.3)), ROWS),
        "MaxMin": Family(_after_dense(ml.MaxMin()), ROWS),
        "GroupSort 4": Family(_after_dense(ml.GroupSort(4)), ROWS),
        "LayerNorm": Family(lambda k: [ml.Dense.init(k, 64, 64), ml.LayerNorm.init(k, 64)], ROWS),
        "RMSNorm": Family(lambda k: [ml.Dense.init(k, 64, 64), ml.RMSNorm.init(k, 64)], ROWS),
    }


def _branch(key: Any, width: int, *first: Any) -> Any:
    dense = ml.Dense(0.3 / width**0.5 * jax.random.normal(key, (width, width)), None)
    return ml.Sequential((*first, dense, ml.Smooth("tanh")))


def _moves_and_blocks() -> Families:
    def coupling(key: Any) -> list[Any]:
        return [ml.Coupling(_branch(key, 32), _branch(key, 32))]

    def of_norms(key: Any) -> list[Any]:
        return [ml.Coupling(*(_branch(key, 32, ml.RMSNorm.init(None, 32), ml.ReLU()),) * 2)]

    def sequential(key: Any) -> list[Any]:
        return [ml.Sequential((ml.Dense.init(key, 64, 64), ml.LeakyReLU(0.6)))]

    return {
        "Permute": Family(_after_dense(ml.Permute((0,))), ROWS),
        "Sequential": Family(sequential, ROWS),
        "Coupling": Family(coupling, ROWS, "subtract"),
        "Coupling vjps": Family(coupling, ROWS, "subtract_vjps"),
        "Coupling of norms": Family(of_norms, ROWS, "subtract"),
    }


def _pooling() -> Families:
    def padded(pool: Any) -> Callable[[Any], list[Any]]:
        back = (ml.PadChannels(16), ml.Reshape((16, 32), (32, 16)))
        return lambda key: [ml.Conv1D.init(key, 16, 16), pool, *back]

    return {
        "MaxPool, PadChannels": Family(padded(ml.MaxPool((2,))), SIGNALS),
        "AveragePool, PadChannels": Family(padded(ml.AveragePool((2,))), SIGNALS),
    }


def _convolutions() -> Families:
    def leaky(make: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
        return lambda key: [make(key), ml.LeakyReLU(0.8)]

    def causal(key: Any) -> Any:
        first = jax.nn.initializers.orthogonal()(key, (1, 16, 16))
        rest = 0.02 * jax.random.normal(key, (2, 16, 16))
        return ml.Conv1D(jnp.concatenate([first, rest]), None)

    def strided(key: Any) -> list[Any]:
        return [ml.Conv1D.init(key, 16, 32, 4, stride=2, padding=1), ml.Reshape((16, 32), (32, 16))]

    def to_depth(key: Any) -> list[Any]:
        back = ml.Reshape((4, 4, 64), (8, 8, 16))
        return [ml.Conv2D.init(key, 16, 16, 1), ml.SpaceToDepth((2, 2)), back]

    circular = leaky(lambda key: ml.Conv1D.init(key, 16, 16, padding="CIRCULAR"))
    line, image = (
        leaky(lambda key: ml.Conv1D.init(key, 16, 16)),
        leaky(lambda key: ml.Conv2D.init(key, 16, 16)),
    )
    return {
        "Conv1D circular": Family(circular, SIGNALS),
        "Conv1D halo": Family(line, SIGNALS, "halo"),
        "Conv1D block 4": Family(leaky(causal), SIGNALS, "block_4"),
        "Conv1D block 8": Family(leaky(causal), SIGNALS, "block_8"),
        "Conv1D strided": Family(strided, SIGNALS),
        "Conv2D halo": Family(image, IMAGES, "halo"),
        "Conv2D halo+refine": Family(image, IMAGES, "halo+refine"),
        "Conv2D pointwise": Family(leaky(lambda key: ml.Conv2D.init(key, 16, 16, 1)), IMAGES, "pointwise"),
        "Conv2D pointwise, SpaceToDepth": Family(to_depth, IMAGES),
        "OrthogonalConv": Family(leaky(lambda key: ml.OrthogonalConv.init(key, 16, 16)), IMAGES),
    }


def _orthogonal(method: str, key: Any) -> list[Any]:
    return [ml.OrthogonalDense.init(key, 64, 64, method=method), ml.LeakyReLU(0.8)]


def _parametrised() -> Families:
    """Families that differ by a keyword or a number."""

    def residual(key: Any) -> list[Any]:
        return [ml.Residual(_branch(key, 64))]

    made = {}
    for method in ("cayley", "expm", "householder"):
        made[f"OrthogonalDense {method}"] = Family(functools.partial(_orthogonal, method), ROWS)
    for kind in ("gelu", "silu", "softplus", "tanh", "sigmoid"):
        made[f"Smooth {kind}"] = Family(_after_dense(ml.Smooth(kind, 0.6)), ROWS)
    for steps in (8, 16, 32):
        made[f"Residual fixed {steps}"] = Family(
            lambda k: [ml.Residual(_branch(k, 64))], ROWS, f"fixed_{steps}"
        )
    return made


def _cokernels() -> Families:
    """He-initialised layers with fragments of their numerical cokernels."""

    def based(one: Any, shape: tuple[int, ...]) -> Any:
        return one.with_basis(jax.ShapeDtypeStruct(shape, jnp.float32))

    def dense(key: Any) -> list[Any]:
        return [ml.Dense.he(key, 64, 64, slope=0.8), ml.LeakyReLU(0.8)]

    def conv1d(key: Any) -> list[Any]:
        return [based(ml.Conv1D.he(key, 16, 16, slope=0.8), SIGNALS), ml.LeakyReLU(0.8)]

    def conv2d(key: Any) -> list[Any]:
        return [based(ml.Conv2D.he(key, 16, 16, slope=0.8), IMAGES), ml.LeakyReLU(0.8)]

    made = {}
    for percent in (2, 10, 30, 50):
        made[f"Dense cokernel {percent}%"] = Family(dense, ROWS, f"cokernel_{percent}")
    for percent in (10, 30, 50):
        made[f"Conv1D cokernel {percent}%"] = Family(conv1d, SIGNALS, f"cokernel_{percent}")
    made["Conv2D cokernel 30%"] = Family(conv2d, IMAGES, "cokernel_30")
    made["Dense He exact"] = Family(dense, ROWS, "exact")
    to_depth = (ml.Reshape((64,), (8, 8, 1)), ml.SpaceToDepth((2, 2)), ml.Reshape((4, 4, 4), (64,)))
    made["SpaceToDepth"] = Family(_after_dense(*to_depth), ROWS)
    return made
