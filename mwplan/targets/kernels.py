r"""What a compiled program launches: every kernel after fusion with its traffic and its arithmetic, loops by
their trips.

1. **Kernels** are the instructions of the entry computation and of the bodies of its loops and calls that do
   work: fusions, products, library calls, copies. Of a `cond` the dearest branch counts.
2. **Traffic** of a kernel: the operands that it reads and the results that it writes, each once, in the
   device's main memory. Of what it slices or gathers from it reads what it takes; what it updates in place it
   writes where it updates.
3. **Arithmetic**: $2\,batch\,m\,n\,k$ of a product, 2 for each output, tap and channel of a convolution, 1 an
   element of anything else, `TRANSCENDENTAL` where it is a function such as `exp`.
4. **Cycles**, where the compiler estimates them (TPUs).

Not known: how far a kernel stays below the device's rates, what caches spare, kernels that overlap.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mwplan.targets.devices import Device, TpuChip
from mwplan.targets.hlo import Array, Computation, Instruction, Module
from mwplan.targets.trips import trip_count

#: Trips of a loop whose number the compiler does not know.
UNKNOWN_TRIPS = 10
TRANSCENDENTAL = 15  # flop of one element of `exp` and the like

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *(
        "partition-id",
        "replica-id",
        "copy-done",
        "slice-done",
        "async-done",
        "async-update",
        "add-dependency",
    ),
}
_VIEWS = {"bitcast", "reshape", "transpose", "copy", "convert", "get-tuple-element"}
_TAKES = {"slice", "dynamic-slice", "gather"}
_TRANSCENDENTAL = {
    *(
        "exponential",
        "exponential-minus-one",
        "log",
        "log-plus-one",
        "tanh",
        "tan",
        "sine",
        "cosine",
        "power",
    ),
    *("logistic", "erf", "atan2", "cbrt", "acos", "asin", "atan", "cosh", "sinh", "rng-bit-generator"),
}
_MOVES = {
    *(
        "copy",
        "transpose",
        "reshape",
        "broadcast",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "gather",
    ),
    *(
        "concatenate",
        "pad",
        "reverse",
        "iota",
        "copy-start",
        "slice-start",
        "convert",
        "scatter",
        "bitcast-convert",
    ),
}
_LIBRARY_PRODUCTS = ("gemm", "matmul", "cublas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of a compiled program, or several that cost the same.

    **Attributes:** `name`, of the first; `kind`: "product", "convolution", "reduction", "elementwise", "move"
    (copies and the like), "library", "communication"; `read_bytes`, `written_bytes`, to and from main memory;
    `flop`, pairs of a kind of arithmetic ("half", "tf32", "float32", "float64") and its number; `cycles`, the
    compiler's estimate, 0 where it gives none; `times`, how often it runs in all; `scope`, the operation of
    the source that it comes from.

    >>> compiled = mw.targets.compile(jnp.dot, jnp.ones((64, 64)), jnp.ones((64, 64)), cached=False)
    >>> sum(kernel.times * kernel.moved_bytes for kernel in compiled.kernels) == compiled.moved_bytes
    True
    """

    name: str
    kind: str
    read_bytes: int
    written_bytes: int
    flop: tuple[tuple[str, float], ...] = ()
    cycles: int = 0
    times: int = 1
    scope: str = ""

    @property
    def moved_bytes(self) -> int:
        """To and from main memory, of one run."""
        return self.read_bytes + self.written_bytes

    def bound(self, device: Device) -> tuple[str, float]:
        """What bounds one run on `device`, "arithmetic", "traffic" or "cycles", and its nanoseconds, without
        the launch."""
        if self.cycles and isinstance(device.chip, TpuChip):
            return "cycles", 1e9 * self.cycles / device.chip.clock_hz
        arithmetic, traffic = device.arithmetic_ns(dict(self.flop)), device.traffic_ns(self.moved_bytes)
        return ("arithmetic", arithmetic) if arithmetic > traffic else ("traffic", traffic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop of a compiled program: how often its body runs each time that it is entered (`known`: by the
    compiler's word; else `UNKNOWN_TRIPS`), and the kernels of one trip.

    >>> def thrice(x):
    ...     return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)
    >>> [loop.trips for loop in mw.targets.compile(thrice, jnp.ones(4096), cached=False).loops]
    [3]
    """

    name: str
    trips: int
    known: bool
    kernels: int
    scope: str = ""


def kernels(module: Module) -> tuple[tuple[Kernel, ...], tuple[Loop, ...]]:
    """Every kernel of a program, in order, and its loops, outer ones before inner ones."""
    reader = Reader(module)
    found = list(reader.of(module.entry, 1))
    return tuple(found), tuple(reader.loops)


def together(found: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Kernels that cost the same as one, by how often they run in all."""
    alike: dict[tuple[object, ...], list[Kernel]] = {}
    for one in found:
        key = (one.kind, one.read_bytes, one.written_bytes, one.flop, one.cycles, one.scope)
        alike.setdefault(key, []).append(one)
    return tuple(dataclasses.replace(some[0], times=sum(k.times for k in some)) for some in alike.values())


class Reader:
    """Walks the computations of a program."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.loops: list[Loop] = []
        self.arithmetic = functools.cache(self._arithmetic)

    def of(self, computation: Computation, times: int) -> Iterator[Kernel]:
        """The kernels of a computation that runs so many times."""
        for one in computation:
            if one.opcode in _FREE or (one.opcode == "custom-call" and one.target in _NO_KERNEL):
                continue
            if one.opcode == "while":
                yield from self.loop(one, computation, times)
            elif one.opcode == "conditional":
                yield from self.branches(one, times)
            elif one.opcode in ("call", "async-start") and (inner := self.called(one)):
                yield from self.of(inner, times)
            else:
                yield self.kernel(one, computation, times)

    def called(self, one: Instruction) -> Computation | None:
        """The computation that a call runs."""
        name = one.computation("to_apply") or one.computation("calls")
        return self.module.computations.get(name or "")

    def loop(self, one: Instruction, around: Computation, times: int) -> Iterator[Kernel]:
        """The kernels of a loop: of its body, and of its condition."""
        trips = trip_count(self.module, one, around)
        body, condition = (self.module.computations[one.computation(a) or ""] for a in ("body", "condition"))
        at = len(self.loops)
        count = UNKNOWN_TRIPS if trips is None else trips
        inside = [*self.of(condition, times * (count + 1)), *self.of(body, times * count)]
        per_trip = sum(1 for kernel in inside if kernel.times >= times)
        self.loops.insert(
            at, Loop(name=one.name, trips=count, known=trips is not None, kernels=per_trip, scope=one.scope)
        )
        yield from inside

    def branches(self, one: Instruction, times: int) -> list[Kernel]:
        """The kernels of the branch that moves most."""
        text = one.text("branch_computations")
        names = re.findall(r"%?([\w.\-]+)", text) if text else []
        names += [one.computation(a) or "" for a in ("true_computation", "false_computation")]
        some = [
            list(self.of(self.module.computations[n], times)) for n in names if n in self.module.computations
        ]
        return max(some, key=lambda found: sum(k.times * (k.moved_bytes + 1) for k in found), default=[])

    def kernel(self, one: Instruction, around: Computation, times: int) -> Kernel:
        """One instruction."""
        read, written = self.traffic(one, around)
        flop = self.flop(one, around)
        return Kernel(
            name=one.name,
            kind=self.kind(one),
            read_bytes=read,
            written_bytes=written,
            flop=tuple(sorted((kind, count) for kind, count in flop.items() if count)),
            cycles=cycles(one),
            times=times,
            scope=one.scope,
        )

    # -- traffic ---------------------------------------------------------------------------------------------

    def traffic(self, one: Instruction, around: Computation) -> tuple[int, int]:
        """Bytes read and written in main memory."""
        given = [around.instructions[name] for name in one.operands if name in around.instructions]
        inner = self.called(one) if one.opcode == "fusion" else None
        if inner is not None:
            return self._read_by_fusion(inner, given), self._written_by_fusion(inner, one)
        written = _main(one.arrays)
        sizes = [_main(some.arrays) for some in given]
        if one.opcode in _TAKES:
            return min(written, sizes[0]) if sizes else written, written
        if one.opcode == "dynamic-update-slice" and len(sizes) > 1:
            return sizes[1], sizes[1]
        if one.opcode == "scatter" and len(sizes) > 2:
            return sizes[1] + 2 * sizes[-1], sizes[-1]
        if one.opcode in ("copy-start", "slice-start"):
            # The tuple holds the source too, and a flag; of the source a slice is taken.
            part = min((array.nbytes for array in one.arrays if array.dims), default=0)
            inner_arrays = one.arrays[:1] if one.opcode == "copy-start" else one.arrays[1:]
            return (part if sizes and sizes[0] else 0), (part if _main(inner_arrays) else 0)
        operands = {
            name: _main(around.instructions[name].arrays)
            for name in one.operands
            if name in around.instructions
        }
        return sum(operands.values()), written

    def _read_by_fusion(self, inner: Computation, given: list[Instruction]) -> int:
        """What it reads of its operands; of one that is given twice, the larger part."""
        taken: dict[str, int] = {}
        users = inner.users()
        for one in inner:
            if one.opcode == "parameter" and one.literal.isdigit() and int(one.literal) < len(given):
                array = given[int(one.literal)]
                whole = _main(array.arrays)
                part = min(whole, self._taken(inner, users, one, whole))
                taken[array.name] = max(part, taken.get(array.name, 0))
        return sum(taken.values())

    def _taken(
        self, inner: Computation, users: dict[str, list[Instruction]], one: Instruction, whole: int
    ) -> int:
        """How many of its `whole` bytes the readers of `one` take."""
        total = 0
        for user in users[one.name]:
            if user.opcode in _TAKES and user.operands[0] == one.name:
                total += user.nbytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                continue  # written over
            elif user.opcode in ("bitcast", "reshape"):
                total += self._taken(inner, users, user, whole)
            elif user.opcode == "fusion" and (nested := self.called(user)) is not None:
                more = nested.users()
                inside = [p for p in nested if p.opcode == "parameter" and p.literal.isdigit()]
                total += sum(
                    self._taken(nested, more, p, whole)
                    for p in inside
                    if int(p.literal) < len(user.operands) and user.operands[int(p.literal)] == one.name
                )
            else:
                return whole
            if total >= whole:
                return whole
        return total

    def _written_by_fusion(self, inner: Computation, one: Instruction) -> int:
        """What it writes of its results."""
        root = inner.root
        parts = [inner.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(one.arrays):
            return _main(one.arrays)
        return sum(min(_main((array,)), _updated(inner, part)) for array, part in zip(one.arrays, parts))

    # -- arithmetic ------------------------------------------------------------------------------------------

    def flop(self, one: Instruction, around: Computation) -> dict[str, float]:
        """Arithmetic by its kind."""
        inner = self.called(one) if one.opcode == "fusion" else None
        if inner is not None:
            return dict(self.arithmetic(inner.name))
        return _flop(one, around)

    def _arithmetic(self, name: str) -> dict[str, float]:
        computation = self.module.computations[name]
        total: dict[str, float] = collections.defaultdict(float)
        for one in computation:
            for kind, count in self.flop(one, computation).items():
                total[kind] += count
        return dict(total)

    def kind(self, one: Instruction) -> str:
        """What the instruction mostly does."""
        if one.opcode == "custom-call":
            if "conv" in one.target.lower():
                return "convolution"
            return "product" if any(name in one.target.lower() for name in _LIBRARY_PRODUCTS) else "library"
        if one.opcode.startswith(("all-", "reduce-scatter", "collective", "send", "recv")):
            return "communication"
        inside = self._opcodes(one)
        if "convolution" in inside:
            return "product" if "window=" not in one.rest and not self._windowed(one) else "convolution"
        if inside & {"dot", "ragged-dot"}:
            return "product"
        if inside & {"fft", "cholesky", "triangular-solve", "sort", "custom-call"}:
            return "library"
        if inside & {"reduce", "reduce-window", "select-and-scatter"}:
            return "reduction"
        return "move" if inside <= (_MOVES | _FREE) else "elementwise"

    def _opcodes(self, one: Instruction) -> set[str]:
        inner = self.called(one) if one.opcode == "fusion" else None
        return {one.opcode} if inner is None else set().union(*(self._opcodes(part) for part in inner))

    def _windowed(self, one: Instruction) -> bool:
        inner = self.called(one) if one.opcode == "fusion" else None
        parts = [one] if inner is None else list(inner)
        return any(
            (part.opcode == "convolution" and "window=" in part.rest)
            or (part.opcode == "fusion" and self._windowed(part))
            for part in parts
        )


_NO_KERNEL = {"AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound"}


def _main(arrays: Iterable[Array]) -> int:
    """Bytes of those arrays that lie in the device's main memory."""
    return sum(one.nbytes for one in arrays if one.space == 0)


def _updated(inner: Computation, part: Instruction) -> int:
    """Bytes that a fusion writes of one of its results: of an update in place, the update's."""
    while part.opcode in _VIEWS and part.operands and part.operands[0] in inner.instructions:
        part = inner.instructions[part.operands[0]]
    if part.opcode == "dynamic-update-slice" and part.operands[1] in inner.instructions:
        return inner.instructions[part.operands[1]].nbytes
    return 1 << 62


def cycles(one: Instruction) -> int:
    """The compiler's estimate of a kernel's cycles; 0 where it gives none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
    value = int(found[1]) if found else 0
    return 0 if value >= 2**62 else value


def _flop(one: Instruction, around: Computation) -> dict[str, float]:
    """Of one instruction that is no fusion."""
    given = [around.instructions[name] for name in one.operands if name in around.instructions]
    if one.opcode == "dot" and given:
        inner = math.prod(given[0].arrays[0].dims[axis] for axis in _axes(one.text("lhs_contracting_dims")))
        return {_precision(one, given[0].arrays[0]): 2.0 * one.arrays[0].size * inner}
    if one.opcode == "convolution" or (one.opcode == "custom-call" and "conv" in one.target.lower()):
        return _convolution(one, given)
    if one.opcode == "custom-call":
        if any(name in one.target.lower() for name in _LIBRARY_PRODUCTS) and given:
            return _library_product(one, given)
        return {}
    if one.opcode in _FREE | _MOVES:
        return {}
    size = max((array.size for array in one.arrays), default=0)
    if one.opcode in ("reduce", "reduce-window", "sort") and given:
        size = max(size, given[0].arrays[0].size if given[0].arrays else 0)
    kind = "float64" if any(array.dtype in ("f64", "c128") for array in one.arrays) else "float32"
    return {kind: float(size * (TRANSCENDENTAL if one.opcode in _TRANSCENDENTAL else 1))}


def _axes(text: str | None) -> list[int]:
    return [int(one) for one in (text or "").split(",") if one.strip().isdigit()]


def _precision(one: Instruction, operand: Array) -> str:
    """The units that multiply: by the operand's type, and what the program asks for."""
    if operand.dtype in ("f64", "c128"):
        return "float64"
    if operand.dtype in ("f32", "c64"):
        whole = "highest" in one.rest or "ALG_DOT_F32_F32_F32" in one.rest
        return "float32" if whole else "tf32"
    return "half"


def _library_product(one: Instruction, given: list[Instruction]) -> dict[str, float]:
    """A product by a library: which axes it sums over is in the backend's notes."""
    numbers = next((found for found in _values(one.config, "dot_dimension_numbers")), {})
    axes = [int(axis) for axis in numbers.get("lhs_contracting_dimensions", ())]
    left = given[0].arrays[0]
    inner = math.prod(left.dims[axis] for axis in axes) if axes else (left.dims[-1] if left.dims else 1)
    return {_precision(one, left): 2.0 * one.arrays[0].size * inner}


def _values(tree: object, key: str) -> Iterator[dict[str, list[str]]]:
    """Every value of `key` in a tree of JSON."""
    if isinstance(tree, dict):
        if isinstance(tree.get(key), dict):
            yield tree[key]
        for value in tree.values():
            yield from _values(value, key)


def _convolution(one: Instruction, given: list[Instruction]) -> dict[str, float]:
    """A convolution, or a gradient of one: 2 for each tap and channel that an output of the convolution sees.

    A library's gradients carry the labels of the convolution itself: which of the three arrays is the filter,
    and which the output, depends on the function."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None or len(given) < 2:
        return {}
    left, right, result = given[0].arrays[0], given[1].arrays[0], one.arrays[0]
    if "BackwardFilter" in one.target:
        taps, output = result, right
    elif "BackwardInput" in one.target:
        taps, output = right, left
    else:
        taps, output = right, result
    outer = taps.dims[labels[2].index("o")] if "o" in labels[2] else 1
    seen = taps.size / max(1, outer)
    if one.opcode == "convolution":
        seen *= _within(one)
    return {_precision(one, left): 2.0 * output.size * seen}


def _within(one: Instruction) -> float:
    """The share of a convolution's taps that fall on values, not on the zeros of a dilated input."""
    window = one.text("window") or ""
    dilated = re.search(r"lhs_dilate=([\dx]+)", window)
    return 1 / math.prod(int(k) for k in dilated[1].split("x")) if dilated else 1.0
