"""Where a step will run, and everything about it that depends on that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common.errors import ArgumentError
from mwplan.compilers import compiling
from mwplan.targets import plugins
from mwplan.targets.devices import DEVICES, Device, GpuChip, TpuChip, device_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a step will run: the attached device, or another one that XLA compiles for from here.

    **Attributes:** `name`; `platform`, "cpu", "gpu" or "tpu"; `device`, its figures, None where they are not
    known (an attached device without a name in `mw.targets.DEVICES`); `attached`, whether programs compiled
    for it run here.

    >>> mw.targets.target_of("h200").pooled_memory
    True
    """

    name: str
    platform: str
    device: Device | None
    attached: bool = False

    @property
    def compiler_options(self) -> dict[str, str]:
        """XLA options under which plans hold there, as `mw.compiler_options`."""
        return compiling.options_of(self.platform)

    @property
    def barriers_need_options(self) -> bool:
        """Whether `lax.optimization_barrier`s are dropped there before equal expressions are merged, unless
        the program is compiled with `compiler_options`."""
        return self.platform == "cpu" and jax.__version_info__ < (0, 11)

    @property
    def product_bits(self) -> int:
        """Bits of the fraction with which float32 operands enter products at JAX's default precision: 23 is
        all of them, 10 is TF32, 7 is bfloat16."""
        if self.platform == "gpu":
            old = isinstance(chip := self.chip, GpuChip) and chip.compute_capability < (8, 0)
            return 23 if old else 10
        return 7 if self.platform == "tpu" else 23

    @property
    def host_memory(self) -> bool:
        """Whether residuals can be moved to the host's memory: whether that is another memory than the
        device's."""
        return self.platform != "cpu"

    @property
    def pooled_memory(self) -> bool:
        """Whether JAX keeps the memory that programs free: else the system hands large blocks out anew, page
        by page."""
        return self.platform != "cpu"

    @property
    def padded_arrays(self) -> bool:
        """Whether arrays take more memory than their elements: rounded up to tiles of their last two axes."""
        return self.platform == "tpu"

    @property
    def chip(self) -> GpuChip | TpuChip | None:
        """What the compiler must know of the device."""
        return self.device.chip if self.device is not None else None

    @property
    def compiler(self) -> str:
        """The versions of what compiles for it."""
        return plugins.version(None if self.attached else self.device)

    @property
    def facts(self) -> str:
        """What the compiler is told, as text: with the compiler's version it determines what becomes of a
        program."""
        if self.attached:
            return f"attached {jax.devices()[0].device_kind}"
        return repr(self.device)

    def place(self) -> Any:
        """The `jax.Device` that programs are lowered for. Raises `CompilerMissingError` where its compiler is
        not installed."""
        if self.attached:
            return jax.devices()[0]
        assert self.device is not None
        return plugins.place(self.device)

    def __str__(self) -> str:
        return f"{self.name} (attached)" if self.attached else self.name


def attached() -> Target:
    """JAX's default device here.

    >>> mw.targets.attached().attached
    True
    """
    one = jax.devices()[0]
    known = {"gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
    return Target(
        name=f"{one.platform}:{one.device_kind}",
        platform=known.get(one.platform, one.platform),
        device=_named(one.device_kind),
        attached=True,
    )


def target_of(target: str | Device | Target | None) -> Target:
    """The target that is meant: None, the attached device; a name in `DEVICES`; a `mw.Device` with a `chip`.

    **Raises:** `ArgumentError` for an unknown name, or for a device of whose chip nothing is known.

    >>> mw.targets.target_of("v5e").platform
    'tpu'
    """
    if target is None:
        return attached()
    if isinstance(target, Target):
        return target
    device = device_of(target)
    if device.chip is None:
        raise ArgumentError(
            f"nothing can be compiled for `{device.name}`, of whose chip nothing is known: name one of "
            f"{', '.join(name for name, one in DEVICES.items() if one.chip)}, or describe it with "
            "`mw.Device(..., chip=mw.GpuChip(...))`"
        )
    return Target(
        name=device.name, platform="tpu" if isinstance(device.chip, TpuChip) else "gpu", device=device
    )


def installed(target: str | Device | Target) -> bool:
    """Whether programs can be compiled for `target` here.

    >>> mw.targets.installed(mw.targets.attached())
    True
    """
    one = target_of(target)
    return one.attached or (one.device is not None and plugins.missing(one.device) is None)


def _named(kind: str) -> Device | None:
    """The device of that product's name."""
    same = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    if kind in same:
        return DEVICES[same[kind]]
    return next(
        (one for one in DEVICES.values() if isinstance(one.chip, GpuChip) and one.chip.product == kind), None
    )
