"""JAX's own activations as layers: the same values and derivatives, with store rules that keep less, vijps
and inverses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mwplan.layers.activations import ReLU
from mwplan.layers.smooth import Smooth
from mwplan.network.chain import STANDARD

STANDARD.update(
    {
        jnp.tanh: Smooth("tanh"),
        jax.lax.tanh: Smooth("tanh"),
        jax.nn.gelu: Smooth("gelu_tanh"),
        jax.nn.relu: ReLU(),
        jax.nn.sigmoid: Smooth("sigmoid"),
        jax.nn.silu: Smooth("silu"),
        jax.nn.softplus: Smooth("softplus"),
    }
)
