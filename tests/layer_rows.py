"""The table of layers that every check of `test_layers` runs through: a new layer is a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwplan import layers as ml
from mwplan.common import trees
from mwplan.network import rules

K = jax.random.key


def noise(seed: int, shape: tuple[int, ...]) -> Any:
    """White noise in float32, by NumPy: `jax.random` compiles anew for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def jiggle(layer: Any, scale: float = 0.02, seed: int = 9) -> Any:
    """`layer` with its parameters moved a little: well-conditioned, not special. Bases stay."""
    params = trees.parameters(layer)
    return trees.with_parameters(layer, [p + scale * noise(seed + i, p.shape) for i, p in enumerate(params)])


def causal(layer: Any) -> Any:
    """`layer` with its strongest tap first, as the block recursion wants it."""
    return dataclasses.replace(layer, weight=jnp.roll(layer.weight, -((layer.weight.shape[0] - 1) // 2), 0))


@dataclass(frozen=True)
class Row:
    """A layer to make, the trailing shape of its input, and the option names it must have."""

    make: Callable[[], Any]
    shape: tuple[int, ...]
    options: tuple[str, ...]

    def arrays(self) -> tuple[Any, Any, Any]:
        """The layer, an input with two batch axes, and a cotangent of its output."""
        layer = self.make()
        x = noise(2, (2, 3, *self.shape))
        return layer, x, noise(3, jax.eval_shape(layer, x).shape)


def branch(seed: int, size: int, scale: float = 1.0) -> Any:
    first = ml.Dense(scale * noise(seed, (size, size)), jnp.zeros(size))
    return ml.Sequential((first, ml.Smooth("tanh"), ml.Dense(noise(seed + 9, (size, size)), None)))


def he_conv(cls: Any, shape: tuple[int, ...], *args: Any, **kw: Any) -> Any:
    return cls.he(K(1), *args, **kw).with_basis(jax.ShapeDtypeStruct(shape, jnp.float32))


ROWS = {
    "dense": Row(lambda: jiggle(ml.Dense.init(K(1), 6, 6)), (6,), ("exact", "exact+refine")),
    "dense-tall": Row(lambda: jiggle(ml.Dense.init(K(1), 7, 4)), (7,), ("exact", "exact+refine")),
    "dense-wide": Row(lambda: jiggle(ml.Dense.init(K(1), 4, 7)), (4,), ("null",)),
    "dense-he": Row(lambda: ml.Dense.he(K(1), 16, 16), (16,), ("cokernel_2", "cokernel_10", "cokernel_50")),
    "dense-he-wide": Row(lambda: ml.Dense.he(K(1), 8, 11), (8,), ("null", "cokernel_30", "cokernel_50")),
    "conv1d-same": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4)), (9, 4), ("halo", "halo+refine")),
    "conv1d-valid": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID")), (9, 4), ("spectral",)
    ),
    "conv1d-circular": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR")), (7, 4), ("spectral",)
    ),
    "conv1d-dilated": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2)), (11, 4), ("halo",)),
    "conv1d-groups": Row(lambda: jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2)), (8, 6), ("halo",)),
    "conv1d-explicit": Row(lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),))), (8, 4), ("halo",)),
    "conv1d-s2-double": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 3, 6, 4, stride=2, padding=1)), (10, 3), ("halo",)
    ),
    "conv1d-s3-dilated": Row(
        lambda: jiggle(ml.Conv1D.init(K(1), 4, 4, 3, stride=3, dilation=2)), (13, 4), ("halo",)
    ),
    "conv1d-he": Row(lambda: he_conv(ml.Conv1D, (12, 6), 6, 6), (12, 6), ("cokernel_10", "cokernel_50")),
    "conv1d-he-wide": Row(lambda: he_conv(ml.Conv1D, (12, 4), 4, 7), (12, 4), ("cokernel_50",)),
    "block-same": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4))), (9, 4), ("block_4", "block_8", "block_16")
    ),
    "block-k4": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 3, 4, padding="VALID"))),
        (12, 4),
        ("block_4", "block_8"),
    ),
    "block-circular": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding="CIRCULAR"))), (10, 4), ("block_4",)
    ),
    "block-dilated": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, dilation=2))), (11, 4), ("block_8",)
    ),
    "block-groups": Row(lambda: causal(jiggle(ml.Conv1D.init(K(1), 6, 4, groups=2))), (8, 6), ("block_4",)),
    "block-explicit": Row(
        lambda: causal(jiggle(ml.Conv1D.init(K(1), 4, 4, padding=((2, 0),)))), (8, 4), ("block_4",)
    ),
    "conv2d-same": Row(lambda: jiggle(ml.Conv2D.init(K(1), 3, 3)), (6, 5, 3), ("halo",)),
    "conv2d-1x1": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 4, 3, 1)),
        (3, 4, 4),
        ("pointwise", "pointwise+refine", "spectral"),
    ),
    "conv2d-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 3, stride=2, padding=1)), (7, 6, 3), ("pointwise", "halo")
    ),
    "conv2d-s2-double": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 3, 6, stride=2, padding=1)), (6, 8, 3), ("halo",)
    ),
    "conv2d-k4s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 5, 4, stride=2, padding="VALID")), (9, 8, 2), ("spectral",)
    ),
    "conv2d-mixed": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 2, (3, 5), stride=(1, 3), padding=((1, 2), (0, 2)))),
        (6, 9, 2),
        ("halo",),
    ),
    "conv2d-circular-s2": Row(
        lambda: jiggle(ml.Conv2D.init(K(1), 2, 4, 3, stride=2, padding="CIRCULAR", groups=2)),
        (6, 8, 2),
        ("spectral",),
    ),
    "conv2d-he": Row(lambda: he_conv(ml.Conv2D, (6, 6, 4), 4, 4), (6, 6, 4), ("cokernel_20",)),
    "conv2d-he-groups": Row(
        lambda: he_conv(ml.Conv2D, (6, 4, 4), 4, 4, groups=2, padding="CIRCULAR"),
        (6, 4, 4),
        ("cokernel_30",),
    ),
    "leaky": Row(lambda: ml.LeakyReLU(0.3), (5,), ("divide",)),
    "maxmin": Row(lambda: ml.MaxMin(), (3, 6), ("undo",)),
    "groupsort": Row(lambda: ml.GroupSort(3), (2, 6), ("undo", "whole_bits")),
    "groupsort-16": Row(lambda: ml.GroupSort(16), (32,), ("undo",)),
    "relu": Row(lambda: ml.ReLU(), (5,), ("whole", "whole_bits")),
    "average": Row(lambda: ml.AveragePool((2, 3)), (5, 6, 2), ("sum",)),
    "max": Row(lambda: ml.MaxPool((2, 2)), (5, 6, 3), ("read", "whole_index")),
    "max-1d": Row(lambda: ml.MaxPool((5,)), (11, 2), ("read",)),
    "flatten": Row(lambda: ml.Flatten(2), (3, 4), ("move",)),
    "reshape": Row(lambda: ml.Reshape((3, 4), (2, 6)), (3, 4), ("move",)),
    "permute": Row(lambda: ml.Permute((2, 0, 1)), (2, 3, 4), ("move",)),
    "swap": Row(lambda: ml.Swap(), (3, 4), ("move",)),
    "space-to-depth": Row(lambda: ml.SpaceToDepth((2, 3)), (4, 6, 2), ("move",)),
    "pad-channels": Row(lambda: ml.PadChannels(2), (3, 4), ("padded",)),
    "orthogonal": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 6), (6,), ("jvp",)),
    "orthogonal-tall": Row(lambda: ml.OrthogonalDense.init(K(1), 6, 4, method="expm"), (6,), ("jvp",)),
    "orthogonal-wide": Row(
        lambda: ml.OrthogonalDense.init(K(1), 4, 6, method="householder"), (4,), ("null",)
    ),
    "orthogonal-conv1d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 3, dims=1), (7, 4), ("jvp",)),
    "paraunitary-1d": Row(lambda: ml.ParaunitaryConv.init(K(1), 4, 3, 4, dims=1), (7, 4), ("jvp",)),
    "paraunitary-2d": Row(lambda: ml.ParaunitaryConv.init(K(1), 4, 4), (6, 5, 4), ("jvp", "whole_free")),
    "orthogonal-conv2d": Row(lambda: ml.OrthogonalConv.init(K(1), 4, 4), (6, 5, 4), ("jvp", "whole_free")),
    "smooth-gelu": Row(lambda: ml.Smooth("gelu", 0.3), (5,), ("divide", "whole_input")),
    "smooth-softplus": Row(lambda: ml.Smooth("softplus", 0.2), (5,), ("divide", "whole_input")),
    "gelu": Row(lambda: ml.Smooth("gelu"), (5,), ("whole_input",)),
    "tanh": Row(lambda: ml.Smooth("tanh"), (5,), ("whole_input",)),
    "layernorm": Row(lambda: jiggle(ml.LayerNorm.init(None, 7), 0.2), (7,), ("moments",)),
    "rmsnorm": Row(lambda: jiggle(ml.RMSNorm.init(None, 7), 0.2), (7,), ("moments", "whole_input")),
    "coupling": Row(
        lambda: ml.Coupling(branch(1, 4), branch(2, 4)), (8,), ("subtract", "subtract_vjps", "whole_input")
    ),
    "coupling-relu": Row(
        lambda: ml.Coupling(
            ml.Sequential((ml.ReLU(), branch(1, 4))),
            ml.Sequential((branch(2, 4), ml.LeakyReLU(0.2), ml.MaxMin(), branch(3, 4))),
        ),
        (8,),
        ("subtract",),
    ),
    "sequential-pairs": Row(
        lambda: ml.Sequential((ml.Split(), ml.Coupling(branch(1, 4), branch(2, 4)), ml.Concatenate())),
        (8,),
        ("parts",),
    ),
    "sequential-thirds": Row(lambda: ml.Sequential((ml.Split(3), ml.Concatenate())), (4, 6), ("parts",)),
    "residual": Row(lambda: ml.Residual(branch(1, 4, 0.03)), (4,), ("fixed_16", "fixed_32", "whole_input")),
    "sequential": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Dense.init(K(1), 6, 6)), ml.LeakyReLU(0.5), ml.Dense.he(K(2), 6, 6), ml.ReLU())
        ),
        (6,),
        ("parts", "parts.cokernel_50"),
    ),
    "sequential-conv": Row(
        lambda: ml.Sequential(
            (jiggle(ml.Conv2D.init(K(1), 4, 4)), ml.MaxMin(), ml.MaxPool((2, 2)), ml.Flatten(3))
        ),
        (5, 4, 4),
        ("parts",),
    ),
}


OPTIONS = [(name, option) for name, row in ROWS.items() for option in row.options]


# One option of each family of layers and rule by default; the others of each row with the slow tests.
FIRST = {(name.split("-")[0], option.split("_")[0]): (name, option) for name, option in reversed(OPTIONS)}


RULES = [
    pytest.param(*one, marks=() if one in FIRST.values() else pytest.mark.slow)
    for one in {(n, o.split("_")[0]): (n, o) for n, o in reversed(OPTIONS) if "+" not in o}.values()
]


# Numbers of the fragment for one example, by hand: 6 examples in a case, 4 bytes a number.
FRAGMENTS = {
    "dense-wide": {"null": 3},
    "dense-he": {"cokernel_2": 1, "cokernel_10": 2, "cokernel_30": 5, "cokernel_50": 8},
    "conv1d-same": {"halo": 2 * 4},
    "conv1d-dilated": {"halo": 4 * 4},
    "conv1d-explicit": {"halo": 2 * 4},
    "conv2d-same": {"halo": (8 * 7 - 6 * 5) * 3},
    "conv2d-s2": {"halo": (9 * 7 - 7 * 6) * 3},  # the last padded column is read by no output
    "conv1d-he": {
        "cokernel_50": 2 * 6 + 2 * 27
    },  # halo; 9 frequencies of a grid of 16, 54 directions, half of them: 27, complex
    "block-same": {"block_4": 5 * 4, "block_8": 3 * 4},
    "block-dilated": {"block_8": 7 * 4},
    "block-k4": {"block_4": 7 * 3},
    "layernorm": {"moments": 2},
    "rmsnorm": {"moments": 1},
    "pad-channels": {"padded": 3 * 2},
    "orthogonal-wide": {"null": 2},
    "relu": {"whole": 5},
}


def find(layer: Any, x: Any, option: str) -> rules.VijpRule:
    for rule in rules.vijp_rules(layer, x):
        if rule.name == option:
            assert isinstance(rule, rules.VijpRule), rule
            return rule
    raise AssertionError(f"no option {option}: {rules.vijp_rules(layer, x)}")


@cache
def arrays(name: str) -> tuple[Any, Any, Any]:
    return ROWS[name].arrays()


def case(name: str, option: str) -> tuple[Any, rules.VijpRule, Any, Any]:
    layer, x, ct_out = arrays(name)
    return layer, find(layer, x, option), x, ct_out


def wide(layer: Any) -> Any:
    return trees.with_parameters(layer, [p.astype(jnp.float64) for p in trees.parameters(layer)])
