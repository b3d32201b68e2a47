"""What a loss needs beside the network: a schedule holds its residuals while that is there too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mwplan.common import trees
from mwplan.compilers.compiling import jit, temporaries
from mwplan.execution.execute import checked_scalar
from mwplan.network import sharding
from mwplan.plans.profiles import LayerProfile, Profile, StoreOption

PyTree = Any


def with_loss(
    profile: Profile, loss: Callable[..., Any], y: PyTree, args: tuple[Any, ...], has_aux: bool
) -> Profile:
    """`profile`, the last layer's forward workspaces as large as what `loss(y, *args)` and its gradient need
    beside `y`, the gradient included.

    Both are there with all that a schedule holds: then the planner knows of a loss with memory of its own.
    The same profile where that is no more than `y`'s gradient, which the ledger counts. `y`: shapes.
    **Cost:** one compilation.
    """
    if sharding.may_be_spread():
        return profile
    needs = loss_bytes(loss, y, args, has_aux)
    if needs <= profile.cotangent_bytes[-1] * 1.02 + 4096:
        return profile
    *others, last = profile.layers
    return dataclasses.replace(profile, layers=(*others, _raised(last, needs, profile.activation_bytes[-2])))


def loss_bytes(loss: Callable[..., Any], y: PyTree, args: tuple[Any, ...], has_aux: bool) -> int:
    """Temporary bytes of the loss and its gradient with respect to `y`, which is one of them."""

    def step(y: PyTree, args: tuple[Any, ...]) -> Any:
        def total(params: list[Any]) -> tuple[Any, Any]:
            value = loss(trees.with_parameters(y, params), *args)
            return checked_scalar(value, has_aux), value

        (_, value), grads = jax.value_and_grad(total, has_aux=True)(trees.tie(trees.parameters(y)))
        # Gradients leave as sums: in an output's memory the compiler would find room for temporaries.
        return value, [leaf.sum() for leaf in trees.tie(grads)]

    return temporaries(jit(step).lower(y, args).compile())


def _raised(layer: LayerProfile, needs: int, input_bytes: int) -> LayerProfile:
    """The layer with forward workspaces such that with its input and output it takes at least what it keeps,
    its output and `needs`."""

    def option(one: Any) -> Any:
        kept = one.keeps_input if isinstance(one, StoreOption) else True
        more = needs if kept else needs - input_bytes
        return dataclasses.replace(one, forward_workspace_bytes=max(one.forward_workspace_bytes, more))

    return dataclasses.replace(
        layer,
        forward_workspace_bytes=max(layer.forward_workspace_bytes, needs),
        store=tuple(map(option, layer.store)),
        moonwalk=tuple(map(option, layer.moonwalk)),
        invert=tuple(map(option, layer.invert)),
        offload=tuple(map(option, layer.offload)),
    )
