"""What is alive when in a compiled program: buffers with their places and lives.

From the compiler's own reports where it writes them (`compiled_with_reports`), which say where each buffer
lies; else from the order in which the program's text says that its instructions run, where buffers that share
a place are guessed from what instructions pass on."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwplan.common.errors import TargetMemoryError
from mwplan.targets import hlo, kernels
from mwplan.targets.hlo import Array, Computation, Instruction, Module

_VALUE = re.compile(
    r"^ value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"^ *(\S+?)(?:\{([\d,]*)\})?:(\d+)-(\d+)$")
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?: color (\d+),)?(?: page \d+,)?(.*):$")
_PASSED_ON = {
    *("bitcast", "get-tuple-element", "tuple", "opt-barrier", "while", "copy-start", "copy-done"),
    *("slice-start", "slice-done", "async-start", "async-done"),
}


@dataclass(frozen=True, slots=True)
class Buffer:
    """A temporary buffer: the instruction that writes it first, its type, bytes, place (None where that is
    not known), and the moments of its life, both included."""

    name: str
    array: Array
    nbytes: int
    offset: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Lives:
    """The temporary buffers of a program; `order`, the names of its instructions by moment; `exact`, by the
    compiler's word."""

    buffers: tuple[Buffer, ...]
    order: tuple[str, ...]
    module: Module
    total_bytes: int
    exact: bool

    def at_peak(self) -> tuple[int, list[Buffer]]:
        """The moment at which most bytes are alive, and what is, the largest first."""
        best, moment = -1, 0
        starts = sorted({one.start for one in self.buffers})
        for at in starts:
            alive = sum(size for _, size in _places(self._alive(at)))
            if alive > best:
                best, moment = alive, at
        return moment, sorted(_each_place(self._alive(moment)), key=lambda one: -one.nbytes)

    def _alive(self, at: int) -> list[Buffer]:
        return [one for one in self.buffers if one.start <= at <= one.stop]


def _places(buffers: Iterable[Buffer]) -> list[tuple[int | None, int]]:
    """Each stretch of memory once: `(offset, bytes)`."""
    known = sorted((one.offset, one.offset + one.nbytes) for one in buffers if one.offset is not None)
    found: list[tuple[int | None, int]] = [(None, one.nbytes) for one in buffers if one.offset is None]
    end = -1
    for low, high in known:
        if high > end:
            found.append((max(low, end), high - max(low, end)))
            end = high
    return found


def _each_place(buffers: Iterable[Buffer]) -> list[Buffer]:
    """Of buffers that lie one over another, the largest, and of equal ones the first."""
    found: list[Buffer] = []
    for one in sorted(buffers, key=lambda one: (-one.nbytes, one.start)):
        at = one.offset
        if at is None or not any(
            other.offset is not None and other.offset < at + one.nbytes and at < other.offset + other.nbytes
            for other in found
        ):
            found.append(one)
    return found


def compiled_with_reports(compile: Callable[[dict[str, str | bool]], Any]) -> tuple[Any, Lives | None]:
    """What `compile(options)` gives, and the lives of its buffers as the compiler reports them; None where it
    writes no such reports.

    Where it finds that the program needs more memory than there is, it has mostly reported by then: the
    program is then None. Raises what `compile` does."""
    program, failed = None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except TargetMemoryError as error:
            failed = error
        stems = [
            str(path).removesuffix(ENDS[0])
            for path in Path(folder).glob(f"*after_optimizations{ENDS[0]}")
            if Path(str(path).removesuffix(ENDS[0]) + ENDS[1]).exists()
        ]
        texts = [[text for end in ENDS if (text := _text(stem, end))] for stem in stems]
    found = [lives for some in texts if len(some) == len(ENDS) and (lives := from_reports(*some)) is not None]
    best = max(found, key=lambda lives: len(lives.order), default=None)
    if failed is not None and best is None:
        raise failed
    return program, best


def _text(stem: str, end: str) -> str:
    """A report; of the program itself also that from before its buffers were assigned, where the compiler
    went no further."""
    for path in (Path(stem + end), Path(f"{stem}_before_buffer_assignment{end}")):
        if path.exists():
            return path.read_text()
    return ""


#: Of the names of the reports on one program.
ENDS = ("-buffer-assignment.txt", "-live-range.txt", ".txt")


def from_reports(assigned: str, ranges: str, text: str) -> Lives | None:
    """The lives of temporary buffers in main memory, from the reports on assignment and on live ranges; None
    where they look otherwise."""
    sequence, _, after = ranges.partition("BufferLiveRange:")
    order = tuple(re.findall(r"^ *\d+:(\S+)$", sequence, re.MULTILINE))
    alive: dict[tuple[str, str], tuple[int, int]] = {}
    for line in after.splitlines():
        if (found := _RANGE.match(line)) is not None:
            alive[found[1], found[2] or ""] = (int(found[3]), int(found[4]))
    total, buffers, temporary = 0, [], False
    for line in assigned.splitlines():
        if (start := _ALLOCATION.match(line)) is not None:
            temporary = "preallocated-temp" in start[3] and start[2] in (None, "0")
            total += int(start[1]) if temporary else 0
        elif temporary and (value := _VALUE.match(line)) is not None:
            life = alive.get((value[1], value[2] or ""))
            if life is not None and int(value[4]) and not value[6].startswith("("):
                (array, *_) = hlo.arrays(value[6]) or (Array("u8", (int(value[4]),)),)
                buffers.append(Buffer(value[1], array, int(value[4]), int(value[5]), *life))
    if not order or not alive:
        return None
    return Lives(tuple(buffers), order, hlo.read(text), total, True)


def from_text(text: str, total_bytes: int) -> Lives:
    """The lives of buffers by the order of a program's text. What a loop needs beside what it is given is
    alive while it runs."""
    module = hlo.read(text)
    walk = _Walk(module)
    walk.through(module.entry, first=True)
    return Lives(tuple(walk.buffers), tuple(walk.order), module, total_bytes, False)


class _Walk:
    """Gives every instruction a moment, and every buffer a life."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.reader = kernels.Reader(module)
        self.order: list[str] = []
        self.buffers: list[Buffer] = []

    def through(self, computation: Computation, *, first: bool = False) -> None:
        """One computation, and those that it calls, at the moments when it calls them."""
        made: dict[int, tuple[str, Array, int]] = {}
        ends: dict[int, int] = {}
        held: dict[
            str, list[int]
        ] = {}  # of each instruction, the buffers that its arrays lie in; -1: not a temporary
        for one in computation:
            at = len(self.order)
            self.order.append(one.name)
            given = [held.get(name, []) for name in one.operands]
            if one.opcode == "while":
                for name in ("condition", "body"):
                    if (inner := self.module.computations.get(one.computation(name) or "")) is not None:
                        self.through(inner)
            for buffer in (b for some in given for b in some):
                ends[buffer] = len(self.order) - 1
            if one.opcode in ("parameter", "constant"):
                held[one.name] = [-1] * len(one.arrays)
            elif one.opcode in _PASSED_ON:
                held[one.name] = _passed_on(one, given)
            else:
                held[one.name] = []
                for array in one.arrays:
                    buffer = len(made)
                    made[buffer] = (one.name, array, at)
                    ends[buffer] = at
                    held[one.name].append(buffer)
        self._written_over(computation, made, ends, held)
        results = set(held.get(computation.root.name, ()))
        self.buffers += [
            Buffer(name, array, array.nbytes, None, at, ends[buffer])
            for buffer, (name, array, at) in made.items()
            if buffer not in results and array.space == 0 and array.nbytes
        ]

    def _written_over(
        self,
        computation: Computation,
        made: dict[int, tuple[str, Array, int]],
        ends: dict[int, int],
        held: dict[str, list[int]],
    ) -> None:
        """Where an elementwise kernel is the last to read an array as large as what it makes, it writes over
        that."""
        for buffer, (name, array, at) in made.items():
            one = computation.instructions[name]
            if self.reader.kind(one) not in ("elementwise", "move"):
                continue
            given = [b for operand in one.operands for b in held.get(operand, ()) if b in made]
            same = [
                b for b in given if ends[b] == at and made[b][2] < at and made[b][1].nbytes == array.nbytes
            ]
            if same and buffer not in same:
                ends[same[0]] = at - 1


def _passed_on(one: Instruction, given: list[list[int]]) -> list[int]:
    """The buffers that an instruction which moves nothing passes on."""
    if one.opcode == "get-tuple-element" and given:
        index = int(one.text("index") or 0)
        return given[0][index : index + 1] if len(one.arrays) == 1 else list(given[0])
    return [buffer for some in given for buffer in some]
