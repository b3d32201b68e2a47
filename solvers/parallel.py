"""Independent parts of a solver's work on several processors.

Threads suffice: nearly all of the time is in numpy's loops, which run without the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: more threads would wait for the interpreter's lock
_MOST = 8


def processors() -> int:
    """How many processors this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`function` of each item, in their order; on as many threads as there are processors for. The first error is raised."""
    threads = min(len(items), processors(), _MOST)
    if threads < 2:
        return [function(item) for item in items]
    # A pool for each call costs a fraction of a millisecond, and none is left to a process that forks.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
