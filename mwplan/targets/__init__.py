"""Devices that steps are compiled for without having them.

A target by name or by its figures, XLA's compilers for it, what they make of a program (bytes, kernels,
times), and all this on disk. Imports `compilers` and below."""

from mwplan.targets.devices import DEVICES, Device, GpuChip, TpuChip
from mwplan.targets.kernels import Kernel, Loop
from mwplan.targets.program import Compiled, compile
from mwplan.targets.target import Target, attached, installed, target_of

__all__ = [
    "DEVICES", "Compiled", "Device", "GpuChip", "Kernel", "Loop", "Target", "TpuChip", "attached", "compile",
    "installed", "target_of",
]  # fmt: skip
