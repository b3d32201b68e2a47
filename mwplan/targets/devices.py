"""Devices by their published figures: rates, memory, and what a compiler must know of the chip.

**Sources.** Rates and memories: the vendors' data sheets, without sparsity. Figures of GPUs by compute
capability: the table "Technical Specifications per Compute Capability" of NVIDIA's *CUDA C++ Programming
Guide*. Launch latencies are ours, of the usual order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mwplan.common.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuChip:
    """An NVIDIA GPU as XLA's compiler must know it.

    **Attributes:** `product`, its name; `compute_capability`, such as (9, 0); `cores`, streaming
    multiprocessors; `l2_bytes`, its last cache; `clock_hz`, at boost. What follows from the compute
    capability is known for those in `PER_CORE`.
    **Raises:** `ArgumentError` for another compute capability.

    >>> chip = mw.GpuChip(
    ...     product="half of one",
    ...     compute_capability=(9, 0),
    ...     cores=66,
    ...     l2_bytes=25 << 20,
    ...     clock_hz=1.5e9,
    ... )
    >>> "core_count: 66" in chip.config(bytes_per_s=2e12, memory_bytes=40 << 30)
    True
    """

    product: str
    compute_capability: tuple[int, int]
    cores: int
    l2_bytes: int
    clock_hz: float

    def __post_init__(self) -> None:
        if self.compute_capability not in PER_CORE:
            known = ", ".join(f"{major}.{minor}" for major, minor in PER_CORE)
            raise ArgumentError(
                f"`GpuChip.compute_capability={self.compute_capability!r}` is not known: it is one of {known}"
            )

    def config(self, bytes_per_s: float, memory_bytes: int) -> str:
        """XLA's description of a GPU to compile for (its `GpuTargetConfigProto`), as text."""
        one = PER_CORE[self.compute_capability]
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {one.shared_bytes}
  threads_per_core_limit: {one.threads}
  core_count: {self.cores}
  fpus_per_core: {one.float32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(bytes_per_s)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_hz / 1e9:g}
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: {one.shared_bytes_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  name: "{self.product}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.product}"
"""


@dataclass(frozen=True, slots=True)
class PerCore:
    """What one multiprocessor of a compute capability has: threads at once, bytes of shared memory, of which
    one block may have so many, and units for float32."""

    threads: int
    shared_bytes: int
    shared_bytes_per_block: int
    float32_units: int


#: By compute capability.
PER_CORE: dict[tuple[int, int], PerCore] = {
    (8, 0): PerCore(2048, 164 << 10, 163 << 10, 64),
    (8, 6): PerCore(1536, 100 << 10, 99 << 10, 128),
    (8, 9): PerCore(1536, 100 << 10, 99 << 10, 128),
    (9, 0): PerCore(2048, 228 << 10, 227 << 10, 128),
    (10, 0): PerCore(2048, 228 << 10, 227 << 10, 128),
    (12, 0): PerCore(1536, 100 << 10, 99 << 10, 128),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TpuChip:
    """A TPU as its compiler must know it.

    **Attributes:** `topology`, the name of the smallest slice; `clock_hz`, of the cycles in which the
    compiler estimates times.

    >>> mw.targets.DEVICES["v5e"].chip
    TpuChip(topology='v5e:2x2', clock_hz=1500000000.0)
    """

    topology: str
    clock_hz: float


@runtime_checkable
class Work(Protocol):
    """A kernel, or a loop of some: what `Device.time_ns` needs to know of it."""

    @property
    def flop(self) -> dict[str, float]:
        """Arithmetic by its kind: "half", "tf32", "float32", "float64"."""

    @property
    def moved_bytes(self) -> int:
        """To and from memory."""

    @property
    def launches(self) -> int:
        """Kernels."""

    @property
    def inner(self) -> Any:
        """Of a loop, its body: more of this kind."""

    @property
    def trips(self) -> int:
        """How often `inner` runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device by its figures: what `mw.estimate` needs to know of it.

    **Attributes:** `name`; flop per second of products in float16 and bfloat16 (`half_flop_per_s`), of
    float32 at JAX's default precision (`tf32_flop_per_s`: tensor cores where there are any, else as float32),
    of all other float32 and float64 arithmetic; `bytes_per_s`, bandwidth of the device's memory; `launch_ns`,
    from the start of an empty kernel to the start of the next; `memory_bytes`, in all; `chip`, a `mw.GpuChip`
    or `mw.TpuChip` where programs are to be compiled for it without having one.

    Rates are sustained ones where they are known, else published peaks: with peaks, estimated times are lower
    bounds.
    **Raises:** `ArgumentError` for what is not a positive number (`launch_ns` may be 0).

    >>> chip = mw.Device(
    ...     name="chip",
    ...     half_flop_per_s=4e14,
    ...     tf32_flop_per_s=2e14,
    ...     float32_flop_per_s=3e13,
    ...     float64_flop_per_s=1e13,
    ...     bytes_per_s=1e12,
    ...     launch_ns=2000,
    ...     memory_bytes=24 << 30,
    ... )
    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 2), jnp.ones((256, 64)), device=chip)
    >>> profile.device
    'chip'
    """

    name: str
    half_flop_per_s: float
    tf32_flop_per_s: float
    float32_flop_per_s: float
    float64_flop_per_s: float
    bytes_per_s: float
    launch_ns: float
    memory_bytes: int
    chip: GpuChip | TpuChip | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:-1]:
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

    def time_ns(self, kernels: Iterable[Work]) -> float:
        """Nanoseconds of kernels, one after the other."""
        total = 0.0
        for kernel in kernels:
            total += max(self.arithmetic_ns(kernel.flop), self.traffic_ns(kernel.moved_bytes))
            total += kernel.launches * self.launch_ns + kernel.trips * self.time_ns(kernel.inner)
        return total

    def arithmetic_ns(self, flop: dict[str, float]) -> float:
        """Nanoseconds of arithmetic at the device's rates."""
        rates = {
            "half": self.half_flop_per_s,
            "tf32": self.tf32_flop_per_s,
            "float32": self.float32_flop_per_s,
            "float64": self.float64_flop_per_s,
        }
        return 1e9 * sum(count / rates[kind] for kind, count in flop.items())

    def traffic_ns(self, moved_bytes: int) -> float:
        """Nanoseconds of traffic at the device's bandwidth."""
        return 1e9 * moved_bytes / self.bytes_per_s


def _gpu(
    name: str, product: str, capability: tuple[int, int], cores: int, l2_mib: int, clock_ghz: float,
    *, half: float, tf32: float, float32: float, float64: float, bytes_per_s: float, memory_bytes: int,
    launch_ns: float = 2000,
) -> Device:  # fmt: skip
    """Rates in Tflop/s."""
    return Device(
        name=name,
        half_flop_per_s=half * 1e12,
        tf32_flop_per_s=tf32 * 1e12,
        float32_flop_per_s=float32 * 1e12,
        float64_flop_per_s=float64 * 1e12,
        bytes_per_s=bytes_per_s,
        launch_ns=launch_ns,
        memory_bytes=memory_bytes,
        chip=GpuChip(
            product=product,
            compute_capability=capability,
            cores=cores,
            l2_bytes=l2_mib << 20,
            clock_hz=clock_ghz * 1e9,
        ),
    )


def _tpu(
    name: str, topology: str, clock_ghz: float, *, half: float, vector: float, bytes_per_s: float,
    memory_gib: int,
) -> Device:  # fmt: skip
    """Rates in Tflop/s: of the matrix units in bfloat16, which float32 products take too at JAX's default
    precision, and of the vector units. Float64 is put together from float32: its rate is a guess."""
    return Device(
        name=name,
        half_flop_per_s=half * 1e12,
        tf32_flop_per_s=half * 1e12,
        float32_flop_per_s=vector * 1e12,
        float64_flop_per_s=vector * 1e11,
        bytes_per_s=bytes_per_s,
        launch_ns=1000,
        memory_bytes=memory_gib << 30,
        chip=TpuChip(topology=topology, clock_hz=clock_ghz * 1e9),
    )


#: The devices that are known by name.
DEVICES: dict[str, Device] = {
    # "NVIDIA H100 Tensor Core GPU" data sheet, SXM5 80 GB: float64 and float32 outside the tensor cores.
    "h100": _gpu(
        "h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 50, 1.98,
        half=989, tf32=494, float32=67, float64=34, bytes_per_s=3.35e12, memory_bytes=80 * 10**9,
    ),
    # "NVIDIA H200 Tensor Core GPU" data sheet, SXM 141 GB: the H100's arithmetic, more memory.
    "h200": _gpu(
        "h200", "NVIDIA H200", (9, 0), 132, 50, 1.98,
        half=989, tf32=494, float32=67, float64=34, bytes_per_s=4.8e12, memory_bytes=141 << 30,
    ),
    # "NVIDIA A100 Tensor Core GPU" data sheet, SXM4 80 GB.
    "a100": _gpu(
        "a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40, 1.41,
        half=312, tf32=156, float32=19.5, float64=9.7, bytes_per_s=2.039e12, memory_bytes=80 * 10**9,
        launch_ns=2500,
    ),
    # "NVIDIA DGX B200" and Blackwell architecture data sheets, of one of its eight GPUs: dense rates.
    "b200": _gpu(
        "b200", "NVIDIA B200", (10, 0), 148, 126, 1.965,
        half=2250, tf32=1125, float32=75, float64=37, bytes_per_s=8e12, memory_bytes=180 * 10**9,
    ),
    # "NVIDIA Ada GPU architecture" white paper, appendix A: rates with float32 accumulation.
    "rtx4090": _gpu(
        "rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 2.52,
        half=165.2, tf32=82.6, float32=82.6, float64=1.29, bytes_per_s=1.008e12, memory_bytes=24 << 30,
    ),
    # cloud.google.com/tpu/docs: peak in bfloat16, bandwidth and memory of a chip. Clocks: of the peak and of
    # the matrix units' size. Vector units: 8 x 128 lanes of 4 units each, a flop a cycle.
    "v5e": _tpu("v5e", "v5e:2x2", 1.5, half=197, vector=6.1, bytes_per_s=819e9, memory_gib=16),
    "v5p": _tpu("v5p", "v5p:2x2x1", 1.75, half=459, vector=14.3, bytes_per_s=2.765e12, memory_gib=95),
    "v6e": _tpu("v6e", "v6e:2x2", 1.75, half=918, vector=14.3, bytes_per_s=1.64e12, memory_gib=32),
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
}  # fmt: skip


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
