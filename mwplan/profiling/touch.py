"""What the first touch of memory costs: where the system hands it out anew for every step, each page is
cleared when it is first written to."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import platforms
from mwplan.compilers.compiling import options_of

_KEPT = 32 << 20  # bytes: glibc's largest threshold, up to which it keeps freed blocks
_RUNS = 5
_PAGE = 1 << 12  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTouch:
    """As the fields of `Profile` of these names."""

    kept_bytes: int = 0
    first_touch_mib_ns: int = 0

    def ns(self, size: int) -> int:
        """What memory of `size` bytes costs."""
        return 0 if size <= self.kept_bytes else size * self.first_touch_mib_ns >> 20


def measured() -> FirstTouch:
    """A large array as a temporary against the same array in an output's memory, which is there already.

    glibc maps blocks above 32 MiB anew each time, and keeps smaller ones; whether that is so here, a smaller
    array tells. Other platforms pool memory.
    """
    if platforms.platform() != "cpu":
        return FirstTouch()
    small, large = (_mib_ns(size) for size in (_KEPT * 3 // 4, 2 * _KEPT))
    return FirstTouch(kept_bytes=_KEPT if small < large / 2 else 0, first_touch_mib_ns=large)


def _mib_ns(size: int) -> int:
    """What an allocation of `size` bytes costs, for each MiB of it."""

    def filled(value: Any) -> tuple[Any, Any]:
        array = jax.lax.optimization_barrier(jnp.broadcast_to(value, (size // 4,)))
        return array, jnp.sum(array[:: _PAGE // 4])  # each page is read, and little else done

    one = jnp.ones((), jnp.float32)  # 4 bytes, with `jax_enable_x64` too
    temporary = jax.jit(lambda v: filled(v)[1], compiler_options=options_of() or None)
    given = jax.jit(
        lambda buffer, v: filled(v),
        donate_argnums=0,
        keep_unused=True,
        compiler_options=options_of() or None,
    )
    buffer = jnp.zeros(size // 4, jnp.float32)
    taken: tuple[list[int], list[int]] = [], []
    for _ in range(2 + _RUNS):
        start = time.perf_counter_ns()
        jax.block_until_ready(temporary(one))
        between = time.perf_counter_ns()
        buffer, _ = jax.block_until_ready(given(buffer, one))
        taken[0].append(between - start)
        taken[1].append(time.perf_counter_ns() - between)
    more = statistics.median(taken[0][2:]) - statistics.median(taken[1][2:])
    return max(0, int(more / (size / 2**20)))
