"""How often the loops of a compiled program run."""

from __future__ import annotations

import math
import re

from mwplan.targets.hlo import Computation, Instruction, Module


def trip_count(module: Module, loop: Instruction, around: Computation) -> int | None:
    """How often a loop runs: by the compiler's note, or from a counter that is compared with a constant; None
    where neither says."""
    known = loop.config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition, body = (module.computations.get(loop.computation(a) or "") for a in ("condition", "body"))
    if condition is None or body is None or condition.root.opcode != "compare":
        return None
    test = condition.root
    where = re.search(r"direction=(\w+)", test.rest)
    left, right = (_resolved(condition, name) for name in test.operands[:2])
    index = _index(left)
    end = _constant(right)
    if index is None or where is None:
        return None
    start_tuple = _resolved(around, loop.operands[0])
    if end is None and (other := _index(right)) is not None:
        end = _initial(around, start_tuple, other)
    start, step = _initial(around, start_tuple, index), _step(body, index)
    if start is None or end is None or not step:
        return None
    span = {
        "LT": end - start,
        "LE": end - start + 1,
        "NE": end - start,
        "GT": end - start,
        "GE": end - start - 1,
    }
    trips = math.ceil(span.get(where[1], 0) / step)
    return trips if trips > 0 else None


def _resolved(computation: Computation, name: str) -> Instruction | None:
    """What a name stands for, through copies."""
    one = computation.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "opt-barrier") and one.operands:
        one = computation.instructions.get(one.operands[0])
    return one


def _constant(one: Instruction | None) -> int | None:
    text = one.literal if one is not None and one.opcode == "constant" else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _index(one: Instruction | None) -> int | None:
    """Which entry of a tuple an instruction reads."""
    if one is None or one.opcode != "get-tuple-element":
        return None
    text = one.text("index")
    return int(text) if text else None


def _initial(around: Computation, start: Instruction | None, index: int) -> int | None:
    """The value with which a loop's tuple starts."""
    if start is None or start.opcode != "tuple" or index >= len(start.operands):
        return None
    return _constant(_resolved(around, start.operands[index]))


def _step(body: Computation, index: int) -> int | None:
    """By how much a loop's counter goes on in each trip."""
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    made = _resolved(body, root.operands[index])
    if made is None or made.opcode not in ("add", "subtract"):
        return None
    parts = [_resolved(body, name) for name in made.operands]
    values = [_constant(part) for part in parts]
    if not any(_index(part) == index for part in parts):
        return None
    # A step that the loop hands on as it was is not looked up: it is 1 in all that JAX writes.
    step = next((value for value in values if value is not None), 1)
    return -step if made.opcode == "subtract" else step
