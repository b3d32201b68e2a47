"""Compiler options without which a plan does not survive compilation, and a warning where they are missing."""

from __future__ import annotations

import contextvars
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

_knows = False  # compiler_options() was called: the user passes them on
_inside_jit: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_mw_jit", default=False)


class PlanUndoneWarning(UserWarning):
    """A planned step is being compiled for the CPU without `mw.compiler_options()`."""


def compiler_options(backend: str | None = None) -> dict[str, str]:
    """XLA options for `jax.jit(..., compiler_options=...)` or `.compile(...)` under which plans hold on `backend`.

    XLA:CPU drops optimization barriers before it merges common subexpressions, so that whatever is
    recomputed in one program is merged with what it was to replace; this keeps the barriers. Other backends need nothing.
    """
    global _knows
    _knows = True
    return options_of(backend)


def options_of(backend: str | None = None) -> dict[str, str]:
    """`compiler_options`, without taking note that the user knows of them."""
    if (backend or jax.default_backend()) == "cpu":
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return {}


def jit(function: Callable[..., Any], **kwargs: Any) -> Any:
    """`jax.jit(function, **kwargs)` with `compiler_options()` for the default backend."""

    @functools.wraps(function)
    def call(*args: Any, **kw: Any) -> Any:
        token = _inside_jit.set(True)
        try:
            return function(*args, **kw)
        finally:
            _inside_jit.reset(token)

    options = {**options_of(), **kwargs.pop("compiler_options", {})}
    return jax.jit(call, compiler_options=options or None, **kwargs)


def temporaries(compiled: Any) -> int:
    """Temporary bytes of a compiled program: what it needs beside its arguments and outputs.

    `compiled` is what `jax.jit(f).lower(...).compile()` returns. (`peak_memory_in_bytes` reads a constant on CPU; this does not.)
    """
    return int(compiled.memory_analysis().temp_size_in_bytes)


def warn_if_undone(*trees: Any) -> None:
    """Warns, once, where a planned step is traced by a `jax.jit` that cannot be known to have the options."""
    if _knows or _inside_jit.get() or jax.default_backend() != "cpu":
        return
    leaves = jax.tree.leaves(trees)
    if any(_is_traced(leaf) for leaf in leaves):
        warnings.warn(
            "a planned step is being compiled for the CPU without the option that keeps XLA from merging recomputation away: "
            "gradients are right, memory is not what was planned. Use `mw.jit`, or `jax.jit(..., compiler_options=mw.compiler_options())`",
            PlanUndoneWarning,
            stacklevel=3,
        )


def _is_traced(leaf: Any) -> bool:
    """Whether `leaf`, under the layers of differentiation and batching, has no value yet."""
    while (inner := _INSIDE.get(type(leaf).__name__)) is not None:
        leaf = getattr(leaf, inner)
    return isinstance(leaf, jax.core.Tracer)


#: Where the tracers of differentiation and batching keep what they wrap.
_INSIDE = {"JVPTracer": "primal", "LinearizeTracer": "primal", "BatchTracer": "val"}
