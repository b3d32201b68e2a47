"""Layers with vijps, one file a family."""

from mwplan.layers.activations import LeakyReLU
from mwplan.layers.base import layer, static
from mwplan.layers.dense import Dense

__all__ = ["Dense", "LeakyReLU", "layer", "static"]
