"""Gradients in float64, against which all methods are checked."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mwplan as mw
from experiments.alternatives.problem import (
    NotApplicableError,
    Problem,
)
from experiments.alternatives.scanned import backprop_scan
from experiments.alternatives.unrolled import backprop


def float64_gradients(problem: Problem) -> list[np.ndarray]:
    """Backpropagation in float64, through a scan where blocks repeat."""
    with jax.enable_x64(True):

        def wide(leaf: Any) -> Any:
            return (
                jnp.asarray(np.asarray(leaf), jnp.float64)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            )

        chain, x = jax.tree.map(wide, (problem.chain, problem.x))
        wider = dataclasses.replace(problem, chain=chain, x=x)
        candidate = backprop(wider, None)
        with contextlib.suppress(NotApplicableError):
            candidate = backprop_scan(wider, None)
        _, grads = mw.jit(candidate.step(problem.loss))(candidate.chain, x, problem.labels)
        return [np.asarray(leaf) for leaf in innermost(grads)]


def innermost(grads: mw.Chain) -> list[Any]:
    """The gradients of all layers in turn, whether they came stacked or not."""
    return jax.tree.leaves(jax.device_get(grads).layers)
