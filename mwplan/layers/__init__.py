"""Layers with vijps, one file a family."""

from mwplan.layers.activations import GroupSort, LeakyReLU, MaxMin, ReLU
from mwplan.layers.base import layer, static
from mwplan.layers.conv import Conv1D, Conv2D
from mwplan.layers.dense import Dense
from mwplan.layers.pooling import AveragePool, MaxPool
from mwplan.layers.shapes import Flatten, PadChannels, Permute, Reshape, SpaceToDepth

__all__ = [
    "AveragePool",
    "Conv1D",
    "Conv2D",
    "Dense",
    "Flatten",
    "GroupSort",
    "LeakyReLU",
    "MaxMin",
    "MaxPool",
    "PadChannels",
    "Permute",
    "ReLU",
    "Reshape",
    "SpaceToDepth",
    "layer",
    "static",
]
