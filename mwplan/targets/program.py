"""Compiles a program for a target, and says what it will take there: bytes, kernels, modelled time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from mwplan.common import cache, platforms
from mwplan.common.errors import ArgumentError, TargetError, TargetMemoryError
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.compilers import compiling
from mwplan.targets import hlo, kernels
from mwplan.targets.devices import Device
from mwplan.targets.kernels import Kernel, Loop
from mwplan.targets.target import Target, target_of

PyTree = Any
SCHEMA = 1
KIND = "targets"  # the folder of what was compiled, in `mwplan.common.cache`
_NEEDS = re.compile(r"(?:[Uu]sed|required for HLO temporaries) \(?([\d.]+)([KMGT]?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a compiler made of a program for a target.

    **Attributes:** `target`, its name; `compiler`, versions; bytes of arguments, results, and of what the
    program needs beside them (`temporary_bytes`); `alias_bytes`, of arguments that results are written over;
    `kernels`, after fusion; `loops`; `executable`, JAX's compiled program, None where all this was known from
    before. It runs where the target is attached, nowhere else.

    >>> compiled = mw.targets.compile(jnp.sort, jnp.ones(1024), cached=False)  # for the attached device
    >>> compiled.argument_bytes, compiled.output_bytes
    (4096, 4096)
    """

    target: str
    compiler: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    kernels: tuple[Kernel, ...]
    loops: tuple[Loop, ...]
    device: Device | None = None
    executable: Any = field(default=None, compare=False, repr=False)

    @property
    def total_bytes(self) -> int:
        """All that the program takes."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def launches(self) -> int:
        """Kernels in all, each as often as it runs."""
        return sum(one.times for one in self.kernels)

    @property
    def moved_bytes(self) -> int:
        """To and from the device's main memory, in all."""
        return sum(one.times * one.moved_bytes for one in self.kernels)

    @property
    def flop(self) -> float:
        """Arithmetic of all kinds."""
        return sum(one.times * sum(count for _, count in one.flop) for one in self.kernels)

    @property
    def cycles(self) -> int:
        """The compiler's own estimate, in all; 0 where it gives none."""
        return sum(one.times * one.cycles for one in self.kernels)

    @property
    def shares_ns(self) -> dict[str, float]:
        """The modelled time by what bounds it: "arithmetic", "traffic", "cycles" and "launches", in
        nanoseconds.

        **Raises:** `ArgumentError` for an attached device whose figures are not known.
        """
        if self.device is None:
            raise ArgumentError(
                f"nothing is known of the rates of {self.target}: compile for a `mw.Device(...)` that "
                "describes it, or run the program"
            )
        found = {"arithmetic": 0.0, "traffic": 0.0, "cycles": 0.0, "launches": 0.0}
        estimated = self.cycles > 0
        for one in self.kernels:
            bound, time_ns = one.bound(self.device)
            if bound != "cycles":
                # A TPU's copies that run beside kernels (`copy-start`) are not waited for.
                aside = estimated and one.kind == "move"
                found[bound] += 0 if aside else one.times * time_ns
                found["launches"] += 0 if estimated else one.times * self.device.launch_ns
            else:
                found[bound] += one.times * time_ns
        return {name: value for name, value in found.items() if value}

    @property
    def modelled_ns(self) -> int:
        """The time that all kernels take one after the other: the larger of arithmetic and traffic of each at
        the device's rates, and a launch; on TPUs, what the compiler estimates. Raises `ArgumentError` as
        `shares_ns`."""
        return math.ceil(sum(self.shares_ns.values()))

    def __str__(self) -> str:
        lines = [
            f"compiled for {self.target} ({self.compiler})",
            f"  {show_bytes(self.total_bytes)} = {show_bytes(self.argument_bytes)} arguments"
            f" + {show_bytes(self.output_bytes)} results + {show_bytes(self.temporary_bytes)} temporaries"
            + (f" - {show_bytes(self.alias_bytes)} shared" if self.alias_bytes else ""),
            f"  {self.launches} kernels, {show_bytes(self.moved_bytes)} moved, {self.flop / 1e9:.4g} Gflop,"
            f" {len(self.loops)} loops",
        ]
        if self.device is not None:
            shares = self.shares_ns
            total = sum(shares.values()) or 1
            text = ", ".join(
                f"{name} {value / total:.0%}" for name, value in sorted(shares.items(), key=lambda p: -p[1])
            )
            lines.append(f"  modelled {show_ns(self.modelled_ns)}: {text}")
        return "\n".join(lines)


def compile(
    function: Callable[..., Any],
    *args: PyTree,
    target: str | Device | Target | None = None,
    compiler_options: dict[str, str] | None = None,
    cached: bool = True,
) -> Compiled:
    """Compiles `function(*args)` for `target`, which need not be here.

    **Arguments:** `function`, or what `jax.jit` made of one; `args`, pytrees of arrays or
    `jax.ShapeDtypeStruct`s (of which shapes and dtypes are taken; nothing is computed); `target`: "h100",
    "h200", "a100", "b200", "rtx4090", "v5e", "v5p", "v6e", a `mw.Device` with a `chip`, or None, the attached
    device; `compiler_options`, XLA's, beside those of the target; `cached`: whether what is known on disk of
    the same program is used, and what is found is kept (then `executable` is None).
    **Returns:** a `Compiled`: temporaries, kernels, loops, modelled time.
    **Raises:** `ArgumentError` for an unknown device; `CompilerMissingError` where its compiler is not
    installed (`pip install 'mwplan[targets]'`; for TPUs `'mwplan[tpu]'` and `JAX_PLATFORMS=cpu`);
    `TargetError` for a program that cannot be lowered for it, such as one with a function that only CPUs
    have; `TargetMemoryError` where the compiler finds that it does not fit the device's memory (TPUs).
    **Cost:** for a GPU 1 to 3 s a small program, 10 to 25 s a step of 28 layers on one core; ten times that
    for a TPU.

    >>> x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    >>> compiled = mw.targets.compile(lambda x: jnp.tanh(x @ x.T) @ x, x)  # with `target="h200"`, for that
    >>> compiled.argument_bytes, compiled.flop >= 2 * 2 * 64 * 64 * 32
    (8192, True)
    """
    one = target_of(target)
    lowered = lower(function, args, one)
    options = {**one.compiler_options, **(compiler_options or {})}

    if not cached:
        return read(built(lowered, options, one), one)
    return known_or_built(key(lowered, one, options), lowered, one, options)


def key(lowered: Any, target: Target, options: Mapping[str, Any]) -> str:
    """Under what the result of a program is kept: its text, the options, the compiler's version and what that
    is told of the target."""
    return cache.key(lowered.as_text(), repr(sorted(options.items())), target.compiler, target.facts)


def known_or_built(name: str, lowered: Any, target: Target, options: Mapping[str, Any]) -> Compiled:
    """What is kept under `name`, or the program compiled, and kept."""
    found = cache.known(name, _Kept, kind=KIND, schema=SCHEMA)
    if found is not None:
        return found.compiled(target)
    fresh = read(built(lowered, options, target), target)
    cache.keep(name, _Kept.of(fresh), kind=KIND, schema=SCHEMA)
    return fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What is kept of a `Compiled`: plain values."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    kernels: tuple[Kernel, ...]
    loops: tuple[Loop, ...]

    @classmethod
    def of(cls, one: Compiled) -> _Kept:
        fields = {name: getattr(one, name) for name in cls.__slots__}
        return cls(**{**fields, "kernels": kernels.together(one.kernels)})

    def compiled(self, target: Target) -> Compiled:
        """For the target that it was found for."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return Compiled(target=target.name, compiler=target.compiler, device=target.device, **fields)


def lower(function: Callable[..., Any], args: tuple[PyTree, ...], target: Target) -> Any:
    """`function` at shapes like `args`, lowered for the target: `jax.stages.Lowered`. Raises as `compile`."""
    if not callable(function):
        raise ArgumentError(f"`function` is a {type(function).__name__}, which is not callable")
    jitted = function if hasattr(function, "lower") else jax.jit(lambda *args: function(*args))
    shapes = placed(args, target)
    try:
        with platforms.lowering_for(target.platform), compiling.options_given():
            return jitted.lower(*shapes)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if target.attached or not _of_platform(error):
            raise
        if library := re.search(r"operation (cusolver|cublas|cusparse|cufft)\w* failed", str(error)):
            raise TargetError(
                f"the program cannot be lowered for {target.name} without NVIDIA's {library[1]}: "
                f"`pip install nvidia-{library[1]}-cu12`"
            ) from error
        raise TargetError(
            f"the program cannot be lowered for {target.name}: {_first(error)}. Something in it exists for "
            "other platforms alone"
        ) from error


def _of_platform(error: Exception) -> bool:
    """Whether a program was refused for its platform, not for what is wrong with it on all of them."""
    text = str(error).lower()
    return any(
        word in text
        for word in ("platform", "lowering", "translation rule", "not supported on", "unimplemented")
    )


def placed(tree: PyTree, target: Target) -> PyTree:
    """The shapes of a tree's arrays, as on the target."""
    where = jax.sharding.SingleDeviceSharding(target.place())

    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        weak = bool(getattr(leaf, "weak_type", False))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where, weak_type=weak)

    found = jax.tree.map(one, tree)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found)):
        raise ArgumentError(
            "`args` hold no array: a program is compiled for the device that its arguments lie on"
        )
    return found


def built(lowered: Any, options: Mapping[str, Any], target: Target) -> Any:
    """What was lowered, compiled: `jax.stages.Compiled`. Raises as `compile`."""
    try:
        return lowered.compile(dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
            used = _NEEDS.search(text)
            needed = round(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")) if used else None
            has = f" of {show_bytes(target.device.memory_bytes)}" if target.device else ""
            raise TargetMemoryError(
                f"the program does not fit the memory of {target.name}{has}: "
                + (f"it needs {show_bytes(needed)}" if needed else _first(error)),
                needed_bytes=needed,
            ) from error
        if target.attached:
            raise
        raise TargetError(
            f"the compiler for {target.name} refuses the program: {_first(error)}. A function of a CPU's "
            "library (`lapack_...`), a callback or a kernel written for another platform cannot run there"
        ) from error


def read(compiled: Any, target: Target) -> Compiled:
    """What JAX's compiled program says of itself."""
    stats = compiled.memory_analysis()
    found, loops = kernels.kernels(hlo.read(compiled.as_text()))
    return Compiled(
        target=target.name,
        compiler=target.compiler,
        argument_bytes=int(stats.argument_size_in_bytes),
        output_bytes=int(stats.output_size_in_bytes),
        alias_bytes=int(stats.alias_size_in_bytes),
        temporary_bytes=int(stats.temp_size_in_bytes),
        kernels=found,
        loops=loops,
        device=target.device,
        executable=compiled,
    )


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")
