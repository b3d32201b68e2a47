"""Reads XLA's text of a compiled program: computations of instructions, in the order in which they run.

**Source:** the format is that of `HloModule::ToString` (openxla/xla); only what costs are made of is read.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"\(([0-9,*]+)\)")
_PARENTHESIS = re.compile(r"[()]")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True, slots=True)
class Array:
    """An array's type: `dims`, the order of its axes in memory, the fastest first, the tiles that a TPU
    rounds them up to, and the memory space, 0 where it is the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of an element."""
        return _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 4)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, with the padding of tiles."""
        dims = [self.dims[axis] for axis in reversed(self.order)] if self.order else list(self.dims)
        if self.tiles and dims:
            tile = self.tiles[0]
            dims = [1] * (len(tile) - len(dims)) + dims
            for k in range(1, len(tile) + 1):
                dims[-k] = -(-dims[-k] // tile[-k]) * tile[-k]
        return -(-math.prod(dims) * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: the arrays that it gives (several of a tuple), its `opcode`, operands by name, and the
    rest of its text."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Of all that it gives."""
        return sum(one.nbytes for one in self.arrays)

    def computation(self, attribute: str) -> str | None:
        """The name of a computation that it calls: `calls`, `body`, `condition`, `to_apply`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    def text(self, attribute: str) -> str | None:
        """The text of an attribute: of `dim_labels=b01f_o01i->b01f` what follows the sign."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|\"[^\"]*\"|[^, ]+)", self.rest)
        return found[1].strip('{}"') if found else None

    @property
    def scope(self) -> str:
        """The operation of the source that it comes from, with its scopes, as JAX wrote it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def config(self) -> dict[str, Any]:
        """What the backend noted of it."""
        return config(self.rest)

    @property
    def target(self) -> str:
        """Of a custom call, the library's function."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


def config(rest: str) -> dict[str, Any]:
    """The JSON after `backend_config=`; empty where there is none."""
    at = rest.find("backend_config={")
    if at < 0:
        return {}
    try:
        found, _ = json.JSONDecoder().raw_decode(rest, at + len("backend_config="))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """What it gives."""
        return next((one for one in self if one.root), list(self)[-1])

    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self:
            for name in dict.fromkeys(one.operands):
                if name in found:
                    found[name].append(one)
        return found


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled program: its computations by name, and the one that it starts with."""

    computations: dict[str, Computation]
    entry: Computation


def read(text: str) -> Module:
    """The program of a text such as `compiled.as_text()`. Raises `ValueError` where it is none."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if line.startswith("  "):
            if current is not None and (one := _instruction(line)) is not None:
                current.instructions[one.name] = one
        elif (start := _START.match(line)) is not None:
            current = computations[start[2]] = Computation(start[2], {})
            entry = current if start[1] else entry
    if entry is None or not entry.instructions:
        raise ValueError("no compiled program's text: it has no ENTRY computation")
    return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays in the text of a type."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


@functools.lru_cache(maxsize=4096)
def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(re.sub(r"[<=]", "", one)) for one in dims.split(",") if one)
    order, _, more = layout.partition(":")
    space = re.search(r"S\((\d+)\)", more)
    tiles = _TILE.findall(more.partition("S(")[0].partition("E(")[0]) if "T(" in more else []
    return Array(
        dtype,
        sizes,
        tuple(int(one) for one in order.split(",") if one.isdigit()),
        tuple(tuple(int(k) for k in tile.replace("*", "1").split(",")) for tile in tiles),
        int(space[1]) if space else 0,
    )


def _closing(line: str, at: int) -> int:
    """The index after the parenthesis that closes the one at `at`."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, at):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(line)


def _instruction(line: str) -> Instruction | None:
    start = _LINE.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) if line.startswith("(", at) else line.find(" ", at)
    open_ = line.find("(", end)
    if end < 0 or open_ < 0:
        return None
    opcode = line[end:open_].strip()
    if opcode == "constant":  # its text may hold anything
        inner, _, rest = line[open_ + 1 :].partition(")")
    else:
        close = _closing(line, open_)
        inner, rest = line[open_ + 1 : close - 1], line[close:]
    return Instruction(
        start[2],
        arrays(line[at:end]),
        opcode,
        tuple(_NAME.findall(inner)),
        inner if opcode in ("constant", "parameter") else "",
        rest,
        start[1] is not None,
    )
