"""Plain backpropagation, which every fit stands beside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from mwplan.common import platforms, trees
from mwplan.compilers import compiling
from mwplan.network import sharding
from mwplan.network.chain import Chain

PyTree = Any


def backpropagation(loss: Callable[..., Any], has_aux: bool, wrt_input: bool) -> Callable[..., Any]:
    """`jax.value_and_grad` of `loss(chain(x), *args)`, as a function of `chain, x, *args`."""

    def plain(chain: Chain, x: PyTree, *args: Any) -> Any:
        return loss(chain(x), *args)

    return jax.value_and_grad(plain, argnums=(0, 1) if wrt_input else 0, has_aux=has_aux, allow_int=True)


class Plain:
    """What plain backpropagation takes, compiled when it is first asked for. It keeps shapes alone.

    **Attributes:** `cheap`: whether that is known, or soon will be: on a CPU, where nothing of the program
    has to be optimised for it; accelerators try kernels meanwhile."""

    def __init__(self, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.step, self.shapes = step, trees.struct(args)
        self.spread = sharding.may_be_spread()
        self._asked = False
        self._bytes: int | None = None

    @property
    def cheap(self) -> bool:
        """As the attribute."""
        return self._asked or platforms.platform() == "cpu"

    def known_bytes(self) -> int | None:
        """Its temporaries where they are cheap to know; None elsewhere."""
        return self.temporary_bytes() if self.cheap else None

    def temporary_bytes(self) -> int | None:
        """Its temporaries; None where arrays may lie on several devices, or it does not compile here, as
        where it does not fit."""
        if not self._asked and not self.spread:
            lowered: Any = jax.jit(lambda *args: self.step(*args)).lower(*self.shapes)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                compiled = lowered.compile(compiling.memory_options() or None)
                self._bytes = compiling.temporaries(compiled)
        self._asked = True
        return self._bytes
