"""Layers with vijps, one file a family."""

from mwplan.layers import standard  # noqa: F401  (JAX's own activations become layers)
from mwplan.layers.activations import GroupSort, LeakyReLU, MaxMin, ReLU
from mwplan.layers.bases import refresh, with_bases
from mwplan.layers.conv import Conv1D, Conv2D
from mwplan.layers.coupling import Coupling
from mwplan.layers.dense import Dense
from mwplan.layers.norm import LayerNorm, RMSNorm
from mwplan.layers.orthogonal import OrthogonalConv, OrthogonalDense
from mwplan.layers.paraunitary import ParaunitaryConv
from mwplan.layers.pooling import AveragePool, MaxPool
from mwplan.layers.residual import Residual
from mwplan.layers.sequential import Sequential
from mwplan.layers.shapes import (
    Concatenate,
    Flatten,
    PadChannels,
    Permute,
    Reshape,
    SpaceToDepth,
    Split,
    Swap,
)
from mwplan.layers.smooth import Smooth
from mwplan.network.layer import layer, static

__all__ = [
    "AveragePool",
    "Concatenate",
    "Conv1D",
    "Conv2D",
    "Coupling",
    "Dense",
    "Flatten",
    "GroupSort",
    "LayerNorm",
    "LeakyReLU",
    "MaxMin",
    "MaxPool",
    "OrthogonalConv",
    "OrthogonalDense",
    "PadChannels",
    "ParaunitaryConv",
    "Permute",
    "RMSNorm",
    "ReLU",
    "Reshape",
    "Residual",
    "Sequential",
    "Smooth",
    "SpaceToDepth",
    "Split",
    "Swap",
    "layer",
    "refresh",
    "static",
    "with_bases",
]
