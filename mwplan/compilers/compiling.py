"""Compiler options without which a plan does not survive compilation, and a warning where they are
missing."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mwplan.common import platforms
from mwplan.common.errors import ArgumentError
from mwplan.plans.packing import Buffer, Workspace

_knows = False  # compiler_options() was called: the user passes them on
_inside_jit: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_mw_jit", default=False)


class PlanUndoneWarning(UserWarning):
    """A planned step is being compiled for the CPU by JAX 0.10 without `mw.compiler_options()`.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", mw.PlanUndoneWarning)  # from here on an error
    ...     step = mw.jit(lambda x: 2 * x).lower(1.0).compile()
    """


def compiler_options(backend: str | None = None) -> dict[str, str]:
    """XLA options for `jax.jit(..., compiler_options=...)` or `.compile(...)` under which plans hold on
    `backend`.

    XLA:CPU (that of JAX 0.10; with 0.11.2 it was not seen to) drops optimization barriers before it merges
    common subexpressions, so that whatever is recomputed in one program is merged with what it was to
    replace; this keeps the barriers. Other backends need nothing.

    >>> double = jax.jit(lambda x: 2 * x, compiler_options=mw.compiler_options())
    >>> double(3.0).item()
    6.0
    """
    global _knows
    _knows = True
    return options_of(backend)


def options_of(backend: str | None = None) -> dict[str, str]:
    """`compiler_options`, without taking note that the user knows of them."""
    if (backend or platforms.platform()) == "cpu":
        # With barriers left, small loops must stay loops: the pass that makes calls of them crashes on a
        # barrier of several arrays, and the process with it.
        return {"xla_disable_hlo_passes": "cse_barrier_expander,small-while-loop-hoisting"}
    return {}


def memory_options(backend: str | None = None) -> dict[str, str | int | bool]:
    """Options under which a program compiles fast, is slow, and has the buffers that it has with
    `compiler_options`: to ask what it needs, not to run it.

    On CPUs nearly all of the time goes into machine code; buffers are assigned before. Elsewhere the usual
    options: GPUs choose algorithms, and their scratch memory, by trying them.
    """
    options: dict[str, str | int | bool] = dict(options_of(backend))
    if (backend or platforms.platform()) == "cpu":
        options |= {name: value for name, value in _FAST_ON_CPUS.items() if _is_known(name)}
    return options


def timing_options(backend: str | None = None) -> dict[str, str | int | bool]:
    """Options under which a program runs as with `compiler_options`, and is compiled in less processor time:
    by one thread where there are other programs for the others."""
    options: dict[str, str | int | bool] = dict(options_of(backend))
    if (backend or platforms.platform()) == "cpu" and _is_known(_IN_ONE):
        options[_IN_ONE] = _FAST_ON_CPUS[_IN_ONE]
    return options


#: The second is gone in JAX 0.12. The third: by default LLVM gets a program in 32 parts, each with all that
#: they share; in one it takes 40% less.
_IN_ONE = "xla_cpu_parallel_codegen_split_count"
_FAST_ON_CPUS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    _IN_ONE: 1,
}


@functools.cache
def _is_known(name: str) -> bool:
    """Whether XLA:CPU has this one of the options above."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0.0).lower().compile({name: _FAST_ON_CPUS[name]})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@contextlib.contextmanager
def options_given() -> Iterator[None]:
    """A context for tracing what will be compiled with the options: no warning that they may be missing."""
    token = _inside_jit.set(True)
    try:
        yield
    finally:
        _inside_jit.reset(token)


def jit(function: Callable[..., Any], **kwargs: Any) -> Any:
    """`jax.jit(function, **kwargs)` with `compiler_options()` for the default backend.

    >>> mw.jit(lambda x: 2 * x)(3.0).item()
    6.0
    """

    @functools.wraps(function)
    def call(*args: Any, **kw: Any) -> Any:
        with options_given():
            return function(*args, **kw)

    options = {**options_of(), **kwargs.pop("compiler_options", {})}
    return jax.jit(call, compiler_options=options or None, **kwargs)


def temporaries(compiled: Any) -> int:
    """Temporary bytes of a compiled program: what it needs beside its arguments and outputs.

    `compiled` is what `jax.jit(f).lower(...).compile()` returns. (`peak_memory_in_bytes` reads a constant on
    CPU; this does not.) Raises `ArgumentError` for anything else.

    >>> compiled = mw.jit(lambda x: jnp.sort(x).sum()).lower(jnp.ones(1024)).compile()
    >>> mw.temporaries(compiled) >= 4096  # the sorted array
    True
    """
    if not hasattr(compiled, "memory_analysis"):
        raise ArgumentError(
            f"`compiled` is a {type(compiled).__name__}, not a compiled program: give "
            "`jitted.lower(...).compile()`, with the arguments of the step"
        )
    return int(compiled.memory_analysis().temp_size_in_bytes)


def workspace(compiled: Any, least_bytes: int) -> Workspace:
    """The buffers of at least `least_bytes` that a compiled program's temporaries consist of; none where this
    version of JAX does not tell."""
    text = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", b"") or b""
    allocations = [list(_fields(value)) for number, value in _fields(text) if number == _ALLOCATION]
    assigned: list[tuple[int, int, int]] = []  # of the largest allocation of temporaries: order, offset, size
    for allocation in allocations:
        if not {number for number, value in allocation if value} & _NO_TEMPORARY:
            parts = [dict(_fields(value)) for number, value in allocation if number == _ASSIGNED]
            found = sorted((part.get(1, 0), part.get(2, 0), part.get(3, 0)) for part in parts)
            assigned = max(assigned, found, key=lambda some: sum(size for *_, size in some))
    large = [(offset, size) for _, offset, size in assigned if size >= least_bytes]
    buffers = []
    for start, (offset, size) in enumerate(large):
        later = range(start + 1, len(large))
        replaced = (k for k in later if large[k][0] < offset + size and offset < sum(large[k]))
        buffers.append(Buffer(size, start, next(replaced, len(large) + 1) - 1))
    return Workspace(total_bytes=temporaries(compiled), buffers=tuple(buffers))


# Numbers of fields in XLA's BufferAssignmentProto (xla/service/hlo.proto).
_ALLOCATION, _ASSIGNED = 3, 9
#: of an allocation: for one thread, a parameter, live out, a constant
_NO_TEMPORARY = {3, 5, 7, 12}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """`(number, value)` of each field of a serialized protocol buffer of integers and messages."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            size = {1: 8, 5: 4}[key & 7] if key & 7 != 2 else integer()
            yield key >> 3, message[at : at + size]
            at += size


def warn_if_undone(*trees: Any) -> None:
    """Warns, once, where a planned step is traced by a `jax.jit` that cannot be known to have the options."""
    if _knows or _inside_jit.get() or platforms.platform() != "cpu" or jax.__version_info__ >= (0, 11):
        return
    leaves = jax.tree.leaves(trees)
    if any(_is_traced(leaf) for leaf in leaves):
        warnings.warn(
            "a planned step is being compiled for the CPU without the option that keeps XLA from merging "
            "recomputation away: "
            "gradients are right, memory is not what was planned. Use `mw.jit`, or `jax.jit(..., "
            "compiler_options=mw.compiler_options())`",
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
