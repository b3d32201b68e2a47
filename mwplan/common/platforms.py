"""For which platform a program is being written: that of the attached device, or of one that it is compiled
for from here.

Layers and the executor write some operations otherwise for CPUs. They ask `platform()`, never
`jax.default_backend()`: while a program is lowered for another device, within `lowering_for`, that is its
platform. JAX keeps what it traced within and without apart.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

_elsewhere: Any = jax.make_user_context("")


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where the program that is being traced will run."""
    return str(_elsewhere.value or jax.default_backend())


def lowering_for(platform: str) -> AbstractContextManager[None]:
    """A context in which programs are written for `platform`."""
    context: AbstractContextManager[None] = _elsewhere(platform)
    return context
