r"""Devices by their published figures, and what an operation costs on one: the larger of arithmetic and
memory traffic.

A kernel that does $F_k$ flop of kind $k$ and moves $B$ bytes takes
$launches \cdot t_0 + \max(\sum_k F_k / R_k,\; B / W)$ with the device's rates $R_k$, bandwidth $W$ and launch
latency $t_0$; kernels follow one another (`mwplan.profiling.costs` says which there are). **Source:**
Williams, Waterman, Patterson, *Roofline*, CACM 52(4), 2009; the latency term is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.profiling import costs, programs

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device by its figures: what `mw.estimate` needs to know of it.

    **Attributes:** `name`; flop per second of products in float16 and bfloat16 (`half_flop_per_s`), of
    float32 at JAX's default precision (`tf32_flop_per_s`: tensor cores where there are any, else as float32),
    of all other float32 and float64 arithmetic; `bytes_per_s`, bandwidth of the device's memory; `launch_ns`,
    from the start of an empty kernel to the start of the next; `memory_bytes`, in all.

    Rates are sustained ones where they are known, else published peaks: with peaks, estimated times are lower
    bounds.
    **Raises:** `ArgumentError` for what is not a positive number (`launch_ns` may be 0).
    """

    name: str
    half_flop_per_s: float
    tf32_flop_per_s: float
    float32_flop_per_s: float
    float64_flop_per_s: float
    bytes_per_s: float
    launch_ns: float
    memory_bytes: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            least = "at least 0" if field.name == "launch_ns" else "above 0"
            number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and least == "above 0"):
                raise ArgumentError(
                    f"`Device({self.name!r}).{field.name}={value!r}` must be a finite number {least}"
                )
        if not isinstance(self.memory_bytes, int):
            raise ArgumentError(
                f"`Device({self.name!r}).memory_bytes={self.memory_bytes!r}` must be an integer"
            )

    def time_ns(self, kernels: Iterable[costs.Kernel]) -> float:
        """Nanoseconds of kernels, one after the other."""
        rates = {
            "half": self.half_flop_per_s,
            "tf32": self.tf32_flop_per_s,
            "float32": self.float32_flop_per_s,
            "float64": self.float64_flop_per_s,
        }
        total = 0.0
        for kernel in kernels:
            busy = sum(count / rates[kind] for kind, count in kernel.flop.items())
            total += 1e9 * max(busy, kernel.moved_bytes / self.bytes_per_s)
            total += kernel.launches * self.launch_ns + kernel.trips * self.time_ns(kernel.inner)
        return total


#: The devices that `mw.estimate` knows by name. Figures without sparsity, from the vendors' data sheets;
#: launch latencies are ours, of the usual order.
DEVICES: dict[str, Device] = {
    # NVIDIA H100 SXM5 80 GB. Peaks of "NVIDIA H100 Tensor Core GPU" data sheet: float64 and float32 outside
    # the tensor cores.
    "h100": Device(
        name="h100",
        half_flop_per_s=989e12,
        tf32_flop_per_s=494e12,
        float32_flop_per_s=67e12,
        float64_flop_per_s=34e12,
        bytes_per_s=3.35e12,
        launch_ns=2000,
        memory_bytes=80 * 10**9,
    ),
    # NVIDIA A100 SXM4 80 GB. Peaks of "NVIDIA A100 Tensor Core GPU" data sheet.
    "a100": Device(
        name="a100",
        half_flop_per_s=312e12,
        tf32_flop_per_s=156e12,
        float32_flop_per_s=19.5e12,
        float64_flop_per_s=9.7e12,
        bytes_per_s=2.039e12,
        launch_ns=2500,
        memory_bytes=80 * 10**9,
    ),
    # Intel Core i7-1165G7 (ark.intel.com): 4 cores at 2.8 GHz with 32 float32 flop a cycle each (one AVX-512
    # unit), two channels of DDR4-3200, 16 GiB. It has no units for half precision: products in it are
    # computed in float32.
    "laptop": Device(
        name="laptop",
        half_flop_per_s=358e9,
        tf32_flop_per_s=358e9,
        float32_flop_per_s=358e9,
        float64_flop_per_s=179e9,
        bytes_per_s=51.2e9,
        launch_ns=1000,
        memory_bytes=16 * 2**30,
    ),
}


def device_of(device: str | Device) -> Device:
    """`device`, or the one of that name. Raises `ArgumentError` where there is none."""
    if isinstance(device, Device):
        return device
    if not isinstance(device, str) or device.lower() not in DEVICES:
        raise ArgumentError(
            f"`device={device!r}` is not known: name one of {', '.join(DEVICES)}, or describe it with "
            "`mw.Device(...)`"
        )
    return DEVICES[device.lower()]


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

    def together(self, *handles: Counted) -> None:
        """Nothing: each operation's time is counted."""

    def derive(self, handle: Counted, base: Counted, more: Counted) -> None:
        """Nothing: each operation's time is counted."""
