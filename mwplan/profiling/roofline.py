r"""Devices by their published figures, and what an operation costs on one: the larger of arithmetic and
memory traffic.

A kernel that does $F_k$ flop of kind $k$ and moves $B$ bytes takes
$launches \cdot t_0 + \max(\sum_k F_k / R_k,\; B / W)$ with the device's rates $R_k$, bandwidth $W$ and launch
latency $t_0$; kernels follow one another (`mwplan.profiling.costs` says which there are). **Source:**
Williams, Waterman, Patterson, *Roofline*, CACM 52(4), 2009; the latency term is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.profiling import costs, programs
from mwplan.targets.devices import DEVICES, Device, device_of

__all__ = ["DEVICES", "Counted", "Device", "Roofline", "device_of"]

PyTree = Any


@dataclass(frozen=True)
class Counted:
    """One operation: the shapes of its result, what it costs, and the program it was counted from."""

    result: Any
    time_ns: int
    workspace_bytes: int
    program: programs.Graph
    kernels: list[costs.Kernel]
    inputs: list[Any]


@dataclass(frozen=True)
class CountedSaving:
    """As `mwplan.profiling.bench.Saving`."""

    saving_bytes: int


class Roofline:
    """Prices operations from their jaxprs: `mwplan.profiling.bench.Pricing` for a device that is not at hand.
    Nothing is run."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def program(self, operation: Callable[..., Any], *args: Any) -> Counted:
        """Counts `operation(*args)`; `args` are arrays or shapes."""
        program, shapes = programs.trace(operation, *args)
        steps = costs.kernels(program)
        return Counted(
            # Objects of its own for every leaf: `saving` tells them apart by identity.
            result=trees.struct(shapes),
            time_ns=math.ceil(self.device.time_ns(steps)),
            workspace_bytes=costs.workspace(program, steps),
            program=program,
            kernels=steps,
            inputs=jax.tree.leaves(args),
        )

    def saving(self, handle: Counted, *, dead: PyTree, temporary: PyTree) -> CountedSaving:
        """What the operation needs less where it is the last user of `dead`."""
        gone = {id(leaf) for leaf in jax.tree.leaves(dead)}
        wanted = {id(leaf) for leaf in jax.tree.leaves(temporary)}
        dying = [v for leaf, v in zip(handle.inputs, handle.program.inputs) if id(leaf) in gone]
        made = [
            v for leaf, v in zip(jax.tree.leaves(handle.result), handle.program.outputs) if id(leaf) in wanted
        ]
        apart = sum(v.nbytes for v in (*dying, *made)) + handle.workspace_bytes
        needs = costs.needs(handle.program, handle.kernels, dying, made)
        return CountedSaving(max(0, apart - needs))

    def together(self, *handles: Counted, free: bool = False) -> None:
        """Nothing: each operation's time is counted."""

    def crossing(
        self, forward: Counted, backward: Counted, *, ends: tuple[PyTree, PyTree], ct: PyTree, grads: PyTree
    ) -> None:
        """Nothing: what is kept is counted."""

    def derive(self, handle: Counted, base: Counted, more: Counted) -> None:
        """Nothing: each operation's time is counted."""
