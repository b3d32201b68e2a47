"""Independent parts of a solver's work on several processors.

Threads suffice: nearly all of the time is in numpy's loops, which run without the interpreter's lock.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mwplan.solvers.tuning import TUNING

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_NAME = "mwplan-solver"


def processors() -> int:
    """How many processors this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _threads() -> int:
    return min(processors(), TUNING.threads)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=_NAME)


if hasattr(os, "register_at_fork"):
    # A forked process has none of the threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def parts(size: int, most: int, least: int) -> int:
    """Into how many parts `each` should have work of `size`: of at most about `most`, and as many as let no
    processor wait, unless they would be of less than `least`."""
    count, threads = -(-size // most), _threads()
    return max(1, min(-(-count // threads) * threads, size // least))


def each(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`function` of each item, in their order; on as many threads as there are processors for. The first
    error is raised."""
    threads = _threads()
    if min(threads, len(items)) < 2 or threading.current_thread().name.startswith(_NAME):
        return [function(item) for item in items]
    return list(_pool(threads).map(function, items))
