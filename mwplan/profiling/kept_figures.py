"""What the options of layers cost, kept on disk under the programs of their own rules."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxlib import version

from mwplan.common import cache
from mwplan.compilers import digests
from mwplan.compilers.alone import Alone, named
from mwplan.compilers.compiling import memory_options, options_of
from mwplan.profiling.carrying import Place
from mwplan.profiling.options import Figures, Options
from mwplan.targets.devices import Device

PyTree = Any
_KIND = "layers"
_SCHEMA = 1
#: The packages whose code figures come of.
_CODE = (
    *("common", "compilers", "execution", "layers", "network", "plans", "profiling", "solvers", "targets"),
)


def surroundings() -> list[str]:
    """What figures depend on beside programs: versions, the device, XLA's and JAX's settings, and this
    package's code."""
    device = jax.devices()[0]
    flags = repr((options_of(), memory_options(), _flags()))
    versions = [jax.__version__, version.__version__]
    where = [device.platform, device.device_kind]
    return [*versions, *where, flags, digests.of_settings(), cache.sources(*_CODE)]


@functools.cache
def _flags() -> str:
    """What the environment says to XLA."""
    return os.environ.get("XLA_FLAGS", "")


def name_of(options: Options, programs: Sequence[str], *settings: str) -> str:
    """The name of a layer's figures; `programs`, of its own rules."""
    inverses = map(str, options.inverses_alone())
    return cache.key(*settings, *surroundings(), options.place.text(), *inverses, *options.names(), *programs)


def known(name: str) -> Figures | None:
    """The figures of that name, if they were kept."""
    return cache.known(name, Figures, kind=_KIND, schema=_SCHEMA)


def keep(name: str, figures: Figures) -> None:
    """Keeps them."""
    cache.keep(name, figures, kind=_KIND, schema=_SCHEMA)


@dataclass(frozen=True)
class _Nothing:
    """Of a program that is only named."""

    saving_bytes: int = 0


class Naming:
    """Prices nothing: the programs of a layer's own rules, traced alone. A `Pricing`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.programs: list[str | None] = []

    def program(self, operation: Callable[..., Any], *args: Any) -> Alone:
        """As `Pricing.program`."""
        return Alone(operation, args)

    def saving(self, handle: Alone, *, dead: PyTree, temporary: PyTree) -> _Nothing:
        """As `Pricing.saving`."""
        return _Nothing()

    def together(self, *handles: Alone, free: bool = False) -> None:
        """As `Pricing.together`."""
        self.programs.append(named(handles))

    def crossing(
        self, forward: Alone, backward: Alone, *, ends: tuple[PyTree, PyTree], ct: PyTree, grads: PyTree
    ) -> None:
        """As `Pricing.crossing`."""

    def derive(self, handle: Alone, base: Alone, more: Alone) -> None:
        """As `Pricing.derive`."""


def name_without_prices(device: Device, one: PyTree, x: PyTree, place: Place, *settings: str) -> str | None:
    """As `name_of`, of a layer that is not priced; None where a program has none. **Cost:** a trace of each
    operation of its own rules."""
    naming = Naming(device)
    options = Options(naming, one, x, place)
    programs = [name for name in naming.programs if name is not None]
    return name_of(options, programs, *settings) if len(programs) == len(naming.programs) else None
