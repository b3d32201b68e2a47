r"""What a compiler keeps from an operation's forward pass to its backward pass, where nothing stands between.

A rule says what is kept: residuals, the layer's input, its output. A compiler that may fuse both passes keeps
what it likes: it makes a residual again from the input, or keeps beside the output what the output was made
of. What it keeps is read off programs in which forward and backward pass are parted by a pause, an array
larger than all else that is made from the output and that the cotangent waits for: what they need beyond that
array crosses the pause. Input and output come and go in one program, and are there anyway in another, which
tells whether they are among it. In a program without a pause the most that either pass needs is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.compilers.alone import SMALL, Alone, moved, summed
from mwplan.targets.program import Compiled

PyTree = Any
_ROW = 1 << 10
#: Of an input or an output: what must be kept so that it counts as kept whole, and not as so many bytes more,
#: such as one of a coupling's two halves, or a mask that is made of it.
WHOLE = 5 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What crosses: bytes beside the layer's input and output, and whether these do; of one that does in part
    the part is among the bytes. `needs_bytes`, the most that either pass needs, its input, output and
    cotangents counted, and gradients of parameters."""

    residual_bytes: int
    keeps_input: bool
    keeps_output: bool
    needs_bytes: int


class Crossing:
    """`forward` and `backward`, operations of which the second takes what the first gives; `x`, `y`: the
    leaves of input and output that come and go; `ct`, of the output's cotangent; `grads`, of the parameters'
    gradients; `start`, which has a program compiled; `memory_bytes`, the device's, of which the pause takes
    no more than half (0: not known). `end_bytes`, of input and output."""

    def __init__(
        self, forward: Alone, backward: Alone, x: PyTree, y: PyTree, ct: PyTree, grads: PyTree,
        start: Callable[..., Future[Compiled]], memory_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.forward, self.backward = forward, backward
        self.end_bytes = trees.nbytes(x), trees.nbytes(y)
        self.grad_bytes = trees.nbytes(grads)
        self.x, self.y, self.ct = ({id(leaf) for leaf in jax.tree.leaves(tree)} for tree in (x, y, ct))
        made = {id(leaf) for leaf in forward.outputs}
        inputs = {id(leaf): leaf for leaf in (*forward.inputs, *backward.inputs) if id(leaf) not in made}
        self.inputs = list(inputs.values())
        most = _most(forward, backward)
        half = memory_bytes // 2 or most
        self.pause_bytes = math.ceil(min(most, half) / (4 * _ROW)) * 4 * _ROW
        zero = jax.ShapeDtypeStruct((), jnp.int32)

        def program(*, x: bool, y: bool, pause: bool) -> Future[Compiled]:
            return start(lambda leaves, zero: self._run(leaves, zero, x, y, pause), self.inputs, zero)

        self.neither = program(x=False, y=False, pause=True)
        self.with_x = program(x=True, y=False, pause=True) if self.end_bytes[0] >= SMALL else None
        self.with_y = program(x=False, y=True, pause=True) if self.end_bytes[1] >= SMALL else None
        self.all = program(x=True, y=True, pause=False)

    def kept(self, told_bytes: int) -> Kept:
        """What was found, once it is compiled; `told_bytes`, of the residuals as the rule has them: where
        what was found differs by less than the sums of the pause need, that is it."""

        def crossing(one: Future[Compiled]) -> int:
            return max(0, one.result().temporary_bytes - self.pause_bytes)

        found, sums = crossing(self.neither), self.pause_bytes // 256
        parts = [0 if one is None else crossing(one) - found for one in (self.with_x, self.with_y)]
        x, y = (part > WHOLE * nbytes for part, nbytes in zip(parts, self.end_bytes))
        residual = found
        if abs(found - told_bytes) <= sums:
            residual = told_bytes
        elif found <= sums:
            residual = min(found, told_bytes)
        residual += sum(part for part, whole in zip(parts, (x, y)) if not whole and part > sums)
        needs = self.all.result().temporary_bytes
        return Kept(residual_bytes=residual, keeps_input=x, keeps_output=y, needs_bytes=needs)

    def _run(self, leaves: Sequence[Any], zero: Any, x: bool, y: bool, pause: bool) -> list[Any]:
        """Both passes; `x`, `y`: whether input and output come and go; `zero` is 0."""
        coming = self.x if x else set()
        given = [
            moved(array, zero) if id(leaf) in coming else array for leaf, array in zip(self.inputs, leaves)
        ]
        known = dict(zip(map(id, self.inputs), trees.tie(given), strict=True))
        self._perform(self.forward, known)
        # What is kept of the output is tied in a step, too (`mwplan.execution.barriers`).
        shared = [id(leaf) for leaf in self.backward.inputs if id(leaf) in self.y]
        known.update(zip(shared, trees.tie([known[key] for key in shared]), strict=True))
        out = [known[id(leaf)] for leaf in self.forward.outputs if id(leaf) in self.y]
        seen = sum((summed(one) for one in out), jnp.zeros((), jnp.float32))
        if pause:
            shape = (self.pause_bytes // (4 * _ROW), _ROW)
            seen = summed(trees.tie(jnp.broadcast_to(seen, shape)))
        late = (seen * zero.astype(jnp.float32)).astype(jnp.int32)
        ct = [key for key in known if key in self.ct]
        known.update(zip(ct, trees.tie([moved(known[key], late) for key in ct]), strict=True))
        self._perform(self.backward, known)
        made = [known[id(leaf)] for leaf in self.backward.outputs]
        return [*map(summed, trees.tie(made)), *(() if y else out)]

    @staticmethod
    def _perform(one: Alone, known: dict[int, Any]) -> None:
        found = one.function(*(known[id(leaf)] for leaf in one.inputs))
        if one.outputs:
            known.update(zip(map(id, one.outputs), found, strict=True))


def _most(*operations: Alone) -> int:
    """More bytes than any part of the operations needs: all that their programs ever make."""
    return sum(
        trees.nbytes(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype))
        for one in operations
        for var in (*one.jaxpr.jaxpr.invars, *_made(one.jaxpr.jaxpr))
        if hasattr(var.aval, "shape") and not jnp.issubdtype(var.aval.dtype, jax.dtypes.extended)
    )


def _made(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found += eqn.outvars
        for one in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
            found += _made(one) if hasattr(one, "eqns") else []
    return found
